// What libllama has to know of pt2gguf's files: their version and their column permutations.
#pragma once

#include "ggml.h"
#include "gguf.h"

#include <string>
#include <unordered_map>
#include <unordered_set>

struct llama_model;
struct llama_model_loader;

// Throws unless this build can read the file: one sentence that says which pt2gguf can.
void llama_pt2_check_version(const gguf_context * metadata);

// Adds the keys that every ternary file has.
void llama_pt2_write_metadata(gguf_context * metadata);

// Throws if a ternary weight whose columns are permuted would become a type that cannot be.
void llama_pt2_check_requantization(const llama_model_loader & ml, const ggml_tensor * weight, ggml_type type);

// The column and row orders of a model. A ternary weight "x.weight" of a file may have an I32 tensor
// "x.perm": stored column j of the weight multiplies element perm[j] of its input.
class llama_pt2_perms {
public:
    // Creates the perm tensors beside their weights, in the same buffer type. To be called after
    // the weights were created and before their data is loaded; throws on a tensor that does not fit.
    void create(llama_model_loader & ml);

    // To be called after the data was loaded. Throws on a perm tensor that is not a permutation, and if permuted
    // columns are split between devices. Equal ones in the same kind of buffer become one, as those of gate and up
    // mostly are: backends see that these can share activations.
    void data_loaded(llama_model & model);

    // Gives a new MUL_MAT or MUL_MAT_ID node the permutation of its weight, if it has one.
    void apply(ggml_tensor * node) const;

    // Throws if some node uses a permuted weight without its permutation, which would compute
    // garbage: an architecture whose code multiplies that weight in a way of its own.
    void check_graph(ggml_cgraph * graph) const;

    // Throws if an adapter changes this weight and the file has its rows or columns in an order of its own: those of an
    // MLP between gate, up and down may be in any, if it is the same in all three.
    void check_adapter(const std::string & weight) const;

private:
    std::unordered_map<const ggml_tensor *, ggml_tensor *> perm_of; // by weight
    std::unordered_set<std::string> reordered;                      // names of weights
};
