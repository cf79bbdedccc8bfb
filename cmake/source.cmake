# Brings the llama.cpp source at the pin.

# pt2_tree_digest(DIRECTORY VARIABLE): one SHA-256 over the sources that no hook touches.
function(pt2_tree_digest directory variable)
    set(patterns)
    foreach(part ggml/include ggml/src include src common conversion gguf-py/gguf tools/mtmd tools/server)
        foreach(extension c cpp h cu cuh py)
            list(APPEND patterns "${directory}/${part}/*.${extension}")
        endforeach()
    endforeach()
    file(GLOB_RECURSE files RELATIVE "${directory}" ${patterns})
    pt2_hooked_files(hooked)
    list(REMOVE_ITEM files ${hooked})
    list(SORT files)
    set(digests "")
    foreach(file IN LISTS files)
        file(SHA256 "${directory}/${file}" digest)
        string(APPEND digests "${file} ${digest}\n")
    endforeach()
    string(SHA256 digest "${digests}")
    set(${variable} "${digest}" PARENT_SCOPE)
endfunction()

# pt2_bring_source(DIRECTORY): fills it from PT2_LLAMA_CPP_SOURCE or with pip, unless it was filled
# so before, for the same hooks (the tree is patched once it is there).
function(pt2_bring_source directory)
    pt2_hooks_digest(hooks)
    set(origin "${PT2_PIN_VERSION} ${PT2_LLAMA_CPP_SOURCE} ${hooks}")
    set(marker "${directory}.complete")
    if(EXISTS "${marker}")
        file(READ "${marker}" present)
        if(present STREQUAL origin)
            return()
        endif()
    endif()
    if(EXISTS "${directory}" AND NOT EXISTS "${marker}")
        message(FATAL_ERROR "${directory} exists and was not made by this build: choose another build directory")
    endif()
    file(WRITE "${marker}" "begun")
    file(REMOVE_RECURSE "${directory}")
    if(PT2_LLAMA_CPP_SOURCE)
        pt2_copy_source("${PT2_LLAMA_CPP_SOURCE}" "${directory}")
    else()
        pt2_unpack_sdist("${directory}")
    endif()
    pt2_tree_digest("${directory}" digest)
    if(NOT digest STREQUAL PT2_PIN_DIGEST)
        file(REMOVE_RECURSE "${directory}")
        message(FATAL_ERROR
            "${PT2_LLAMA_CPP_SOURCE} is not llama.cpp at commit ${PT2_PIN_COMMIT} (its sources have digest ${digest} instead of "
            "${PT2_PIN_DIGEST}): check that commit out, or let pt2gguf bring the source")
    endif()
    file(WRITE "${marker}" "${origin}")
endfunction()

function(pt2_copy_source source directory)
    if(NOT EXISTS "${source}/ggml/include/ggml.h" OR NOT EXISTS "${source}/include/llama.h")
        message(FATAL_ERROR "${source} is not a llama.cpp source tree: it has no ggml/include/ggml.h or include/llama.h")
    endif()
    # Entry by entry: the user's path may hold what means something in a regular expression.
    file(GLOB entries LIST_DIRECTORIES true RELATIVE "${source}" "${source}/*" "${source}/.*")
    list(FILTER entries EXCLUDE REGEX "^(build.*|\\.git)$")
    foreach(entry IN LISTS entries)
        file(COPY "${source}/${entry}" DESTINATION "${directory}"
            PATTERN "__pycache__" EXCLUDE
            PATTERN "*.gguf" EXCLUDE)
    endforeach()
endfunction()

function(pt2_unpack_sdist directory)
    find_package(Python3 REQUIRED COMPONENTS Interpreter)
    set(download "${CMAKE_BINARY_DIR}/sdist")
    set(requirements "${download}/requirements.txt")
    set(archive "${download}/llama_cpp_python-${PT2_PIN_VERSION}.tar.gz")
    file(MAKE_DIRECTORY "${download}")
    file(WRITE "${requirements}" "${PT2_PIN_PACKAGE}==${PT2_PIN_VERSION} --hash=sha256:${PT2_PIN_SHA256}\n")
    if(NOT EXISTS "${archive}")
        message(STATUS "Downloading ${PT2_PIN_PACKAGE} ${PT2_PIN_VERSION} (llama.cpp ${PT2_PIN_COMMIT}, 77 MB)")
        execute_process(
            COMMAND "${Python3_EXECUTABLE}" -m pip download --quiet --no-deps --no-binary ${PT2_PIN_PACKAGE}
                --require-hashes --requirement "${requirements}" --dest "${download}"
            RESULT_VARIABLE failed)
        if(failed)
            message(FATAL_ERROR
                "pip could not download ${PT2_PIN_PACKAGE} ${PT2_PIN_VERSION}: see its message above, or pass a source tree "
                "with -DPT2_LLAMA_CPP_SOURCE=DIR ('pt2gguf build --source DIR')")
        endif()
    endif()
    file(SHA256 "${archive}" sha256)
    if(NOT sha256 STREQUAL PT2_PIN_SHA256)
        file(REMOVE "${archive}")
        message(FATAL_ERROR "${archive} has SHA-256 ${sha256} instead of ${PT2_PIN_SHA256}: removed it, run the build again")
    endif()
    message(STATUS "Unpacking llama.cpp ${PT2_PIN_COMMIT}")
    file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${download}" TOUCH
        PATTERNS "llama_cpp_python-${PT2_PIN_VERSION}/vendor/llama.cpp/*")
    file(RENAME "${download}/llama_cpp_python-${PT2_PIN_VERSION}/vendor/llama.cpp" "${directory}")
    file(REMOVE_RECURSE "${download}/llama_cpp_python-${PT2_PIN_VERSION}" "${directory}/.git")
endfunction()
