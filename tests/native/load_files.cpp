// Loads each file named on the command line, and lets the model that loads decode a few tokens.
// Says one thing of each, ended by a NUL: the names in a damaged file may hold any other byte.
// Built with sanitizers: whatever a file holds, this must not crash.
#include "llama.h"

#include <cstdio>
#include <string>
#include <vector>

static std::string errors;

static void keep_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        errors += text;
        if (errors.back() == '\n') {
            errors.back() = ';';
        }
    }
}

static bool decodes(llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 64;
    params.n_threads = 1;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        return false;
    }
    std::vector<llama_token> tokens = { 1, 2, 3 };
    const bool ok = llama_decode(ctx, llama_batch_get_one(tokens.data(), (int32_t) tokens.size())) == 0;
    llama_free(ctx);
    return ok;
}

int main(int argc, char ** argv) {
    llama_log_set(keep_errors, nullptr);
    llama_backend_init();
    for (int i = 1; i < argc; ++i) {
        errors.clear();
        llama_model_params params = llama_model_default_params();
        llama_model * model = llama_model_load_from_file(argv[i], params);
        if (model) {
            printf("%s: loads and %s%c", argv[i], decodes(model) ? "decodes" : "does not decode", '\0');
            llama_model_free(model);
        } else {
            printf("%s: refused: %s%c", argv[i], errors.c_str(), '\0');
        }
        fflush(stdout);
    }
    llama_backend_free();
    return 0;
}
