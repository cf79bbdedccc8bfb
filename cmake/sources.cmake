# Adds our own sources to upstream's targets.

target_sources(ggml-base PRIVATE "${PT2_PATCHES}/src/ggml/ggml-pt2.c")
target_sources(llama PRIVATE "${PT2_PATCHES}/src/llama/llama-pt2.cpp")

# One CPU target, or one per instruction set with GGML_CPU_ALL_VARIANTS.
get_property(targets DIRECTORY "${LLAMA_CPP_DIR}/ggml/src" PROPERTY BUILDSYSTEM_TARGETS)
foreach(target IN LISTS targets)
    if(target MATCHES "^ggml-cpu(-|$)" AND NOT target MATCHES "-feats$")
        target_sources(${target} PRIVATE
            "${PT2_PATCHES}/src/ggml-cpu/pt2-amx.cpp"
            "${PT2_PATCHES}/src/ggml-cpu/pt2-attention.cpp"
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
        foreach(name pt2-attention pt2-dequantize pt2-group pt2-matmul pt2-mmq-tq1_1 pt2-mmq-tq2_1 pt2-mmvq pt2-quantize)
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

# The kernels for Hopper, whatever other architectures are asked for: they are in sm_90a only.
if(TARGET ggml-cuda)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.0)
        add_library(pt2-hopper OBJECT "${PT2_PATCHES}/src/ggml-cuda/pt2-hopper.cu"
            "${PT2_PATCHES}/src/ggml-cuda/pt2-hopper-attention.cu" "${PT2_PATCHES}/src/ggml-cuda/pt2-hopper-vec.cu")
        set_target_properties(pt2-hopper PROPERTIES CUDA_ARCHITECTURES 90a-real POSITION_INDEPENDENT_CODE ON
            EXPORT_COMPILE_COMMANDS ON)
        foreach(property INCLUDE_DIRECTORIES COMPILE_DEFINITIONS COMPILE_OPTIONS COMPILE_FEATURES)
            set_target_properties(pt2-hopper PROPERTIES ${property} "$<TARGET_PROPERTY:ggml-cuda,${property}>")
        endforeach()
        target_link_libraries(pt2-hopper PRIVATE ggml-base)
        target_compile_definitions(pt2-hopper PRIVATE PT2_HOPPER)
        target_sources(ggml-cuda PRIVATE $<TARGET_OBJECTS:pt2-hopper>)
        set_source_files_properties("${PT2_PATCHES}/src/ggml-cuda/pt2-mmvq.cu"
            "${PT2_PATCHES}/src/ggml-cuda/pt2-group.cu" TARGET_DIRECTORY ggml-cuda
            PROPERTIES COMPILE_DEFINITIONS PT2_HOPPER)
    endif()
endif()
