# The one llama.cpp that the hooks fit: the source inside llama-cpp-python's sdist, so that
# bindings, libraries and tools are one version.
set(PT2_PIN_PACKAGE "llama-cpp-python")
set(PT2_PIN_VERSION "0.3.36")
set(PT2_PIN_SHA256  "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
set(PT2_PIN_COMMIT  "0c1e57098")

# Digest of the sources that the hooks leave alone (pt2_tree_digest), to recognise the pin in a
# tree of the user's own.
set(PT2_PIN_DIGEST  "b36250fbdc0c702031f2c197dda62b7cd283ea27d7717cc745f9b73987b757a9")
