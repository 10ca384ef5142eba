/* A CUDA driver without a device, compiled against NVIDIA's own header: a wrong argument list or structure does not compile, or crashes. */
#include <cuda.h>
#include <stddef.h>
#include <string.h>

_Static_assert(sizeof(CUmemcpyAttributes) == 24 && offsetof(CUmemcpyAttributes, flags) == 20, "attributes");
_Static_assert(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM == 1 && CU_MEMCPY_SRC_ACCESS_ORDER_ANY == 3, "source order");
_Static_assert(CU_MEMHOSTREGISTER_PORTABLE == 1, "portable");
_Static_assert(CU_STREAM_CAPTURE_MODE_GLOBAL == 0 && CU_STREAM_CAPTURE_MODE_RELAXED == 2, "capture modes");
_Static_assert(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED == 900, "capture error");
_Static_assert(CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM == 91, "host pointers");

static const CUcontext context = (CUcontext)(size_t)0x7f0000001000;
static const CUstream stream_of_the_test = (CUstream)(size_t)0x7fff00002000;
static int last_order;
static size_t num_batches;
static int capturing;  /* in global mode, on a thread of the engine's */
static int host_pointers = 1;
static _Thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

CUresult cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }

CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs,
                            size_t *attrsIdxs, size_t numAttrs, CUstream hStream)
{
    if (hStream != stream_of_the_test || numAttrs != 1 || attrsIdxs[0] != 0 || attrs[0].flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count; i++)
        memmove((void *)dsts[i], (void *)srcs[i], sizes[i]);
    last_order = attrs[0].srcAccessOrder;
    num_batches++;
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char *symbol, void **pfn, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status)
{
    if (strcmp(symbol, "cuMemcpyBatchAsync") || version != 13000 || flags)
        return CUDA_ERROR_NOT_FOUND;
    *pfn = (void *)cuMemcpyBatchAsync;
    *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream hStream) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *wanted)
{
    CUstreamCaptureMode before = mode;
    mode = *wanted;
    *wanted = before;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice dev)
{
    *value = host_pointers;
    return attribute == CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemHostRegister(void *p, size_t bytes, unsigned int flags)
{
    if (capturing && mode != CU_STREAM_CAPTURE_MODE_RELAXED)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return p == (void *)0x7f1234567000 && bytes == (5ul << 32) && flags == CU_MEMHOSTREGISTER_PORTABLE ? CUDA_SUCCESS
                                                                                                        : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemHostUnregister(void *p) { return p == (void *)0x7f1234567000 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev) { *pctx = context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext ctx) { return ctx == context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }
CUresult cuDeviceGetPCIBusId(char *id, int len, CUdevice dev) { strncpy(id, "0000:3B:00.0", len); return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream hStream, CUstreamCaptureStatus *status)
{
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return hStream == stream_of_the_test ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorName(CUresult error, const char **name) { *name = "CUDA_ERROR_OF_THE_TEST"; return CUDA_SUCCESS; }

void set_capturing(int value) { capturing = value; }
void set_host_pointers(int value) { host_pointers = value; }
int order_of_last_batch(void) { return last_order; }
size_t number_of_batches(void) { return num_batches; }
