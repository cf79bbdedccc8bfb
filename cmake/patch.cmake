# Applies the hooks: small patches, one per concern, that make upstream's files refer to ours.

# pt2_hooked_files(VARIABLE): the upstream files that the hooks touch.
function(pt2_hooked_files variable)
    set(files)
    file(GLOB hooks "${PT2_PATCHES}/hooks/*.patch")
    foreach(hook IN LISTS hooks)
        file(STRINGS "${hook}" headers REGEX "^\\+\\+\\+ b/")
        foreach(header IN LISTS headers)
            string(SUBSTRING "${header}" 6 -1 file)
            list(APPEND files "${file}")
        endforeach()
    endforeach()
    set(${variable} "${files}" PARENT_SCOPE)
endfunction()

# pt2_hooks_digest(VARIABLE): one SHA-256 over the hooks.
function(pt2_hooks_digest variable)
    set(digests "")
    file(GLOB hooks "${PT2_PATCHES}/hooks/*.patch")
    list(SORT hooks)
    foreach(hook IN LISTS hooks)
        file(SHA256 "${hook}" digest)
        string(APPEND digests "${digest}\n")
    endforeach()
    string(SHA256 digest "${digests}")
    set(${variable} "${digest}" PARENT_SCOPE)
endfunction()

# pt2_apply_hooks(DIRECTORY): idempotent; fails naming the hook and git's words on the hunk.
function(pt2_apply_hooks directory)
    find_package(Git REQUIRED)
    # git must not take a repository around the build directory for the tree's own.
    get_filename_component(parent "${directory}" DIRECTORY)
    set(apply "${CMAKE_COMMAND}" -E env "GIT_CEILING_DIRECTORIES=${parent}" "${GIT_EXECUTABLE}" apply)
    file(GLOB hooks "${PT2_PATCHES}/hooks/*.patch")
    list(SORT hooks)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${hooks})
    foreach(hook IN LISTS hooks)
        get_filename_component(name "${hook}" NAME)
        execute_process(COMMAND ${apply} --reverse --check "${hook}"
            WORKING_DIRECTORY "${directory}" RESULT_VARIABLE not_applied OUTPUT_QUIET ERROR_QUIET)
        if(NOT not_applied)
            continue()
        endif()
        execute_process(COMMAND ${apply} "${hook}"
            WORKING_DIRECTORY "${directory}" RESULT_VARIABLE failed ERROR_VARIABLE why)
        if(failed)
            message(FATAL_ERROR
                "${name} does not fit ${directory}, which should be llama.cpp at commit ${PT2_PIN_COMMIT} "
                "(remove it to bring the source again): ${why}")
        endif()
        message(STATUS "Applied ${name}")
    endforeach()
endfunction()
