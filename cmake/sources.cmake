# Adds our own sources to upstream's targets.

target_sources(ggml-base PRIVATE "${PT2_PATCHES}/src/ggml/ggml-pt2.c")
target_sources(llama PRIVATE "${PT2_PATCHES}/src/llama/llama-pt2.cpp")

# One CPU target, or one per instruction set with GGML_CPU_ALL_VARIANTS.
get_property(targets DIRECTORY "${LLAMA_CPP_DIR}/ggml/src" PROPERTY BUILDSYSTEM_TARGETS)
foreach(target IN LISTS targets)
    if(target MATCHES "^ggml-cpu(-|$)" AND NOT target MATCHES "-feats$")
        target_sources(${target} PRIVATE
            "${PT2_PATCHES}/src/ggml-cpu/pt2-cpu.c"
            "${PT2_PATCHES}/src/ggml-cpu/pt2-panel.cpp"
            "${PT2_PATCHES}/src/ggml-cpu/pt2-mul-mat.cpp")
        target_include_directories(${target} PRIVATE "${PT2_PATCHES}/src/ggml-cpu")
    endif()
endforeach()

# CUDA, and HIP, which compiles the same files.
foreach(target ggml-cuda ggml-hip)
    if(TARGET ${target})
        set(sources)
        foreach(name pt2-dequantize pt2-matmul pt2-mmq-tq1_1 pt2-mmq-tq2_1 pt2-mmvq pt2-quantize)
            list(APPEND sources "${PT2_PATCHES}/src/ggml-cuda/${name}.cu")
        endforeach()
        target_sources(${target} PRIVATE ${sources})
        target_include_directories(${target} PRIVATE
            "${PT2_PATCHES}/src/ggml-cuda" "${LLAMA_CPP_DIR}/ggml/src/ggml-cuda")
        if(target STREQUAL "ggml-hip")
            if("${CMAKE_CXX_COMPILER}" MATCHES ".*hipcc$")
                set(language CXX)
            else()
                set(language HIP)
            endif()
            set_source_files_properties(${sources} TARGET_DIRECTORY ${target} PROPERTIES LANGUAGE ${language})
        endif()
    endif()
endforeach()
