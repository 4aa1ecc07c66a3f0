/* no_cuda.c: the device interface of a build without CUDA: every function says how to get one. */
#include "../kernel.h"

#ifndef MV_WITH_CUDA

static mv_status absent(mv_error *error) {
    return mv_fail(error, MV_DEVICE_ERROR,
                   "this build of minivllm has no CUDA backend; rebuild it with MINIVLLM_CUDA=1, which needs nvcc");
}

const char *mv_cuda_archs(void) { return ""; }

mv_status mv_cuda_device_count(int32_t *count, mv_error *error) {
    *count = 0;
    return absent(error);
}

mv_status mv_cuda_device_info(int32_t device, mv_cuda_info *info, mv_error *error) {
    (void)device, (void)info;
    return absent(error);
}

mv_status mv_cuda_malloc(int32_t device, size_t bytes, void **data, mv_error *error) {
    (void)device, (void)bytes;
    *data = NULL;
    return absent(error);
}

mv_status mv_cuda_free(int32_t device, void *data, mv_error *error) {
    (void)device, (void)data;
    return absent(error);
}

mv_status mv_cuda_copy(int32_t device, void *to, const void *from, size_t bytes, void *stream, mv_error *error) {
    (void)device, (void)to, (void)from, (void)bytes, (void)stream;
    return absent(error);
}

mv_status mv_cuda_stream_wait(int32_t device, void *waiting, void *producing, mv_error *error) {
    (void)device, (void)waiting, (void)producing;
    return absent(error);
}

mv_status mv_cuda_synchronize(int32_t device, void *stream, mv_error *error) {
    (void)device, (void)stream;
    return absent(error);
}

mv_status mv_cuda_launch_nothing(int32_t device, mv_error *error) {
    (void)device;
    return absent(error);
}

mv_status mv_cuda_pointer_device(const void *data, int32_t *device, mv_error *error) {
    (void)data;
    *device = -1;
    return absent(error);
}

#endif
