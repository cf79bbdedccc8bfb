# Adds our own sources to upstream's targets.

target_sources(ggml-base PRIVATE "${PT2_PATCHES}/src/ggml/ggml-pt2.c")
target_sources(llama PRIVATE "${PT2_PATCHES}/src/llama/llama-pt2.cpp")

# One CPU target, or one per instruction set with GGML_CPU_ALL_VARIANTS.
get_property(targets DIRECTORY "${LLAMA_CPP_DIR}/ggml/src" PROPERTY BUILDSYSTEM_TARGETS)
foreach(target IN LISTS targets)
    if(target MATCHES "^ggml-cpu(-|$)" AND NOT target MATCHES "-feats$")
        target_sources(${target} PRIVATE "${PT2_PATCHES}/src/ggml-cpu/pt2-cpu.c")
        target_include_directories(${target} PRIVATE "${PT2_PATCHES}/src/ggml-cpu")
    endif()
endforeach()
