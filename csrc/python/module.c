/* module.c: minivllm._C: its methods, its birth and death. */
#include "base/steps.h"
#include "device.h"
#include "info.h"
#include "ops/docstrings.h"
#include "ops/layer.h"
#include "xla/handlers.h"
#include "xla/plan.h"

#define FAST(name, function, doc)                                                                                      \
    { name, (PyCFunction)(void (*)(void))(function), METH_FASTCALL | METH_KEYWORDS, doc }

#define METHOD(name, args) FAST(#name, py_##name, DOC_##name),

static PyMethodDef methods[] = {
    FACES(METHOD) /* the ops */
    {"_ops", py_ops, METH_NOARGS, "{op: ((name, type, role, optional, required, positional, default), ...)}"},
    FAST("_rms_norm_qkv_packed", py_rms_norm_qkv_packed, "rms_norm_qkv -> out [..., qkv], or (out, residual_out)"),
    FAST("_check_rms_norm_qkv", py_check_rms_norm_qkv, "(hidden, qkv, head_dim, in_out, numbers) of a layer"),
    FAST("_call_layer", py_call_layer,
         "_call_layer($module, layer, x, *, residual=None, out=None, residual_out=None)\n--\n\nlayer(x, ...)"),
    {"_callable_layer", py_callable_layer, METH_O, "(class) -> a subclass whose instances are called from C"},
    {"kernels", py_kernels, METH_NOARGS, "[(op, name, dtype, isa, usable, why_not), ...]"},
    {"last_kernel", py_last_kernel, METH_NOARGS, "(op, name, why) of this thread's last call, or None"},
    FAST(
        "set_num_threads", py_set_num_threads,
        "set_num_threads($module, n)\n--\n\nThreads used by CPU kernels; n < 1: the default, all cores of this process "
        "or OMP_NUM_THREADS where that is less. Calls on torch's tensors run on torch's own threads, by default as "
        "many "
        "as torch.set_num_threads() says."),
    {"get_num_threads", py_get_num_threads, METH_NOARGS,
     "get_num_threads($module, /)\n--\n\nThreads used by CPU kernels."},
    {"cpu_features", py_cpu_features, METH_NOARGS,
     "The instruction sets that kernels may use here, such as "
     "'avx2 avx512'."},
    {"cuda_archs", py_cuda_archs, METH_NOARGS,
     "The GPU code in this build, such as 'sm_80 compute_80 sm_90a'; '' "
     "without CUDA."},
    {"cuda_device_count", py_cuda_device_count, METH_NOARGS, "The number of GPUs; RuntimeError where CUDA cannot run."},
    {"cuda_device_info", py_cuda_device_info, METH_O, "A dict about one GPU, by index."},
    FAST("_plan", py_plan, "(op, GPU or -1, the op's arguments) -> (shapes, in_out, scratch_bytes, attributes)"),
    {"_xla_handlers", py_xla_handlers, METH_NOARGS, "[(op, platform, capsule), ...]"},
    {"_allocate", py_allocate, METH_VARARGS, "(device, bytes) -> memory"},
    {"_address", py_address, METH_O, "(memory) -> int"},
    {"_copy_from_host", py_copy_from_host, METH_VARARGS, "(device, address, host buffer, stream)"},
    {"_copy_to_host", py_copy_to_host, METH_VARARGS, "(device, address, writable host buffer, stream)"},
    {"_stream_wait", py_stream_wait, METH_VARARGS, "(device, waiting, producing)"},
    {"_to_dlpack", py_to_dlpack, METH_VARARGS, "(owner, device, address, dtype, shape, strides, versioned) -> capsule"},
    {"_kind", py_kind, METH_O, "(array) -> (dtype, device)"},
    {"_view", py_view, METH_O, "(array) -> (address, shape, strides, dtype, device, read_only, keeper)"},
    {"_launch_nothing", py_launch_nothing, METH_O, "(device): launches an empty kernel"},
    {"_steps", py_steps, METH_O,
     "(on) -> nanoseconds of calls since the last time: (read, plan, allocate, run, return)"},
    {"_empty", py_empty, METH_VARARGS, "(like, shape) -> a new array of like's framework, device and dtype"},
    {NULL, NULL, 0, NULL},
};

#define PLACE(name, args) [SIGNATURE_##name] = &name##_signature,
static const signature *const signatures[SIGNATURES] = {
    [SIGNATURE_LAYER_CHECK] = &layer_check_signature,
    [SIGNATURE_LAYER_HELD] = &layer_held_signature,
    [SIGNATURE_LAYER_CALL] = &layer_call_signature,
    [SIGNATURE_SET_NUM_THREADS] = &set_num_threads_signature,
    FACES(PLACE) /* the ops */
};

/* What C keeps is the process's own, and what runs on other threads enters the main interpreter. That one has the
 * number 0. Through its slot a module could only say so from CPython 3.12 on. */
static bool is_main_interpreter(void) {
    if (PyInterpreterState_GetID(PyInterpreterState_Get()) == 0) return true;
    if (!PyErr_Occurred())
        PyErr_SetString(
            PyExc_ImportError,
            "minivllm._C works in the main interpreter of a process only, and this is a subinterpreter; "
            "use another process, or where a server makes subinterpreters (mod_wsgi, uWSGI), tell it to use "
            "the main one (WSGIApplicationGroup %{GLOBAL}, single-interpreter)");
    return false;
}

static int execute(PyObject *module) {
    if (!is_main_interpreter()) return -1;
    module_state *state = PyModule_GetState(module); /* zeroed by CPython */
    if (!begin_state(state)) return -1;
    for (int i = 0; i < SIGNATURES; i++)
        if (!prepare_signature(state, signatures[i], i)) return -1;
    return PyModule_AddStringConstant(module, "version", MV_VERSION);
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    return visit_state(PyModule_GetState(module), visit, arg);
}

static int clear(PyObject *module) {
    clear_state(PyModule_GetState(module));
    return 0;
}

static void destroy(void *module) {
    if (PyModule_GetState(module)) clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, __extension__(void *) execute}, /* as CPython wants it, and ISO C does not */
#if !defined(Py_LIMITED_API) && PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "minivllm._C",
    .m_doc = "The ops of minivllm, and what it knows about this machine.",
    .m_size = sizeof(module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = destroy,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
