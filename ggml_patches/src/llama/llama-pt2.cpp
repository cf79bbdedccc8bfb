#include "llama-pt2.h"

#include "ggml-backend.h"
#include "ggml-pt2.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

void llama_pt2_check_version(const gguf_context * metadata) {
    const int64_t key = gguf_find_key(metadata, PT2_VERSION_KEY);
    if (key < 0) {
        return;
    }
    if (gguf_get_kv_type(metadata, key) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(format("%s has type %s instead of u32: not a file that pt2gguf wrote", PT2_VERSION_KEY,
                                        gguf_type_name(gguf_get_kv_type(metadata, key))));
    }
    const uint32_t version = gguf_get_val_u32(metadata, key);
    if (version != PT2_VERSION) {
        throw std::runtime_error(format(
            "%s is %u and this build reads version %u: get a pt2gguf that reads version %u, then run 'pt2gguf build'",
            PT2_VERSION_KEY, version, PT2_VERSION, version));
    }
}

void llama_pt2_write_metadata(gguf_context * metadata) {
    gguf_set_val_u32(metadata, PT2_VERSION_KEY, PT2_VERSION);
    gguf_set_val_u32(metadata, "pt2.block_size", QK_PT2);
}

static const std::string PERM_SUFFIX = ".perm";
static const std::string WEIGHT_SUFFIX = ".weight";

void llama_pt2_check_requantization(const llama_model_loader & ml, const ggml_tensor * weight, ggml_type type) {
    const std::string name = weight->name;
    if (!ggml_pt2_is_ternary(weight->type) || ggml_pt2_is_ternary(type) || name.size() < WEIGHT_SUFFIX.size()) {
        return;
    }
    const std::string perm_name = name.substr(0, name.size() - WEIGHT_SUFFIX.size()) + PERM_SUFFIX;
    if (ml.weights_map.count(perm_name)) {
        throw std::runtime_error(format("tensor '%s' has its columns permuted, which type %s cannot have: quantize the "
                                        "original model instead",
                                        name.c_str(), ggml_type_name(type)));
    }
}

static bool is_perm_name(const std::string & name) {
    return name.size() > PERM_SUFFIX.size() &&
           name.compare(name.size() - PERM_SUFFIX.size(), PERM_SUFFIX.size(), PERM_SUFFIX) == 0;
}

static void check_perm_shape(const ggml_tensor * perm, const ggml_tensor * weight) {
    if (!ggml_pt2_is_ternary(weight->type)) {
        throw std::runtime_error(format("tensor '%s' permutes '%s', which is of type %s instead of tq1_1 or tq2_1",
                                        perm->name, weight->name, ggml_type_name(weight->type)));
    }
    if (perm->type != GGML_TYPE_I32 || ggml_n_dims(perm) != 1 || perm->ne[0] != weight->ne[0]) {
        throw std::runtime_error(format(
            "tensor '%s' is not a permutation: it has %lld elements of type %s, and '%s' has %lld columns", perm->name,
            (long long) ggml_nelements(perm), ggml_type_name(perm->type), weight->name, (long long) weight->ne[0]));
    }
}

static std::unordered_set<std::string> read_reordered(const gguf_context * metadata) {
    static const char * KEY = "pt2.reordered";
    std::unordered_set<std::string> names;
    const int64_t key = gguf_find_key(metadata, KEY);
    if (key < 0) {
        return names;
    }
    if (gguf_get_kv_type(metadata, key) != GGUF_TYPE_ARRAY || gguf_get_arr_type(metadata, key) != GGUF_TYPE_STRING) {
        throw std::runtime_error(format("%s is not an array of strings: not a file that pt2gguf wrote", KEY));
    }
    for (size_t i = 0; i < gguf_get_arr_n(metadata, key); ++i) {
        names.insert(gguf_get_arr_str(metadata, key, i));
    }
    return names;
}

void llama_pt2_perms::create(llama_model_loader & ml) {
    reordered = read_reordered(ml.metadata);
    for (const auto & [name, entry] : ml.weights_map) {
        if (!is_perm_name(name)) {
            continue;
        }
        const std::string weight_name = name.substr(0, name.size() - PERM_SUFFIX.size()) + WEIGHT_SUFFIX;
        ggml_context * ctx = nullptr;
        ggml_tensor * weight = nullptr;
        for (auto it = ml.ctx_map.begin(); it != ml.ctx_map.end() && !weight; ++it) {
            ctx = it->second.get();
            weight = ggml_get_tensor(ctx, weight_name.c_str());
        }
        if (!weight) {
            throw std::runtime_error(
                format("tensor '%s' permutes '%s', which the model does not have", name.c_str(), weight_name.c_str()));
        }
        check_perm_shape(entry.tensor, weight);
        ggml_tensor * perm = ggml_dup_tensor(ctx, entry.tensor);
        ggml_set_name(perm, name.c_str());
        perm_of.emplace(weight, perm);
        ml.n_created++;
    }
}

// Tensor parallelism gives each device some columns of some weights and the same elements of their input.
static void check_split(llama_model & model, const ggml_tensor * weight, const ggml_tensor * perm) {
    const ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(weight->buffer));
    if (dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_META &&
        llama_meta_device_get_split_state(weight, &model.get_split_state_ud).axis == GGML_BACKEND_SPLIT_AXIS_0) {
        throw std::runtime_error(
            format("split mode 'tensor' splits the columns of '%s', which '%s' permutes: use split "
                   "mode 'layer', or a file without permutations (pt2gguf convert --no-ssr)",
                   weight->name, perm->name));
    }
}

void llama_pt2_perms::data_loaded(llama_model & model) {
    std::map<std::pair<ggml_backend_buffer_type_t, std::vector<int32_t>>, ggml_tensor *> known;
    for (auto & [weight, perm] : perm_of) {
        check_split(model, weight, perm);
        std::vector<int32_t> data(perm->ne[0]);
        ggml_backend_tensor_get(perm, data.data(), 0, ggml_nbytes(perm));
        std::vector<bool> seen(data.size(), false);
        for (size_t j = 0; j < data.size(); ++j) {
            if (data[j] < 0 || (size_t) data[j] >= data.size() || seen[data[j]]) {
                throw std::runtime_error(
                    format("tensor '%s' is not a permutation of %zu columns: element %zu is %d, %s", perm->name,
                           data.size(), j, data[j],
                           data[j] < 0 || (size_t) data[j] >= data.size() ? "out of range" : "which occurs twice"));
            }
            seen[data[j]] = true;
        }
        const ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(perm->buffer);
        perm = known.emplace(std::pair(buft, std::move(data)), perm).first->second;
    }
}

void llama_pt2_perms::apply(ggml_tensor * node) const {
    const auto it = perm_of.find(node->src[0]);
    if (it != perm_of.end()) {
        ggml_mul_mat_set_perm(node, it->second);
    }
}

void llama_pt2_perms::check_graph(ggml_cgraph * graph) const {
    if (perm_of.empty()) {
        return;
    }
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        for (int j = 0; j < GGML_MAX_SRC; ++j) {
            const ggml_tensor * src = node->src[j];
            const auto it = src ? perm_of.find(src->view_src ? src->view_src : src) : perm_of.end();
            if (it != perm_of.end() && ggml_mul_mat_get_perm(node) != it->second) {
                throw std::runtime_error(format("node '%s' (%s) uses '%s' without its column order: this architecture "
                                                "needs a file without '%s' (pt2gguf convert --no-ssr)",
                                                node->name, ggml_op_name(node->op), it->first->name, it->second->name));
            }
        }
    }
}

void llama_pt2_perms::check_adapter(const std::string & weight) const {
    if (reordered.count(weight)) {
        throw std::runtime_error(
            format("the adapter changes '%s', whose rows or columns this file has in another order "
                   "than the original model: use a file without (pt2gguf convert --no-ssr)",
                   weight.c_str()));
    }
}
