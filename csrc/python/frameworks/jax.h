/* jax.h: JAX arrays; and their tracers, which are refused by that name. */
#ifndef MV_PYTHON_JAX_H
#define MV_PYTHON_JAX_H

#include "../base/call.h"

extern const framework jax_framework, jax_tracer_framework;

#endif
