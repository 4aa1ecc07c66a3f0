/* linear.h: the weights of a linear layer as an op is given them: one matrix or several, in either layout, with or
 * without biases. */
#ifndef MV_LINEAR_H
#define MV_LINEAR_H

#include "plan.h"

/* The names that an op's user knows. */
typedef struct {
    const char *weight, *weights[MV_MAX_BLOCKS]; /* of one; of the members of a tuple */
    const char *bias, *biases[MV_MAX_BLOCKS];
    const char *outputs;   /* what the number of outputs is called in shapes, such as "qkv" */
    const char *bias_size; /* where that of one bias comes from, such as "= the outputs of weight" */
    int most;              /* members that a tuple has; 1: there are no tuples */
} mv_linear_names;

/* The views. One matrix is in weight[0]; several are a tuple, of which any may be missing. The same of biases. */
typedef struct {
    const char *op;
    const mv_linear_names *names;
    const mv_view *x;
    const mv_view *weight, *bias; /* names->most each */
    mv_weight_layout layout;
} mv_linear_views;

/* Consecutive outputs: a block for each matrix that makes some of them. */
typedef struct {
    mv_block block[MV_MAX_BLOCKS];
    mv_dtype weight_dtype[MV_MAX_BLOCKS];
    int blocks;
    int64_t outputs;
    mv_weight_layout layout; /* that they were taken for: never AUTO */
    bool packed;             /* the blocks are adjacent in memory, and so are their biases */
    bool gated;              /* two blocks, gate and up: `activation` joins each pair of their outputs */
    mv_activation activation;
} mv_layer;

/* Of an op with one `weight` and one `bias`. */
mv_linear_views mv_one_weight(const char *op, const mv_view *x, const mv_view *weight, const mv_view *bias,
                              mv_weight_layout layout);
/* All of its layer, which has an output or more. */
mv_status mv_read_one_weight(const mv_linear_views *views, mv_layer *layer, mv_error *error);

/* Reads the matrices: one block for each. */
mv_status mv_read_weights(const mv_linear_views *views, int64_t hidden, mv_layer *layer, mv_error *error);
/* One matrix becomes so many blocks. */
void mv_cut_weight(mv_layer *layer, int blocks, const int64_t *outputs);
/* For a layer with all its blocks. */
mv_status mv_read_biases(const mv_linear_views *views, mv_layer *layer, mv_error *error);
/* `out` must overlap no weight and no bias. */
mv_status mv_check_apart_from_weights(mv_named out, const mv_linear_views *views, mv_error *error);

/* Gives a plan's task the layer. Weights of several dtypes, or some transposed and some not, are computed in parts that
 * share both. */
void mv_add_layer(mv_plan *plan, const mv_layer *layer);

#endif
