// The device of device.h, and a LibTorch in which the CPU is a CUDA device: the bindings of csrc/cuda run as they are.
#include "device.h"

#include <csetjmp>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr unsigned kMaxThreads = 1024;

struct Fiber {
  ucontext_t context;  // of the first entry; jumps, which save no signal mask, are much faster
  jmp_buf barrier;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  bool started, done;
};

std::vector<Fiber> fibers(kMaxThreads);
jmp_buf scheduler;
Fiber* current;
const std::function<void()>* body;

void enter() {
  (*body)();
  current->done = true;
  _longjmp(scheduler, 1);
}

// Lets a thread run to its next barrier, or its end.
void resume(unsigned thread) {
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
  current = &fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (current->started) _longjmp(current->barrier, 1);
  current->started = true;
  setcontext(&current->context);
}

void run_block(unsigned threads, unsigned seed) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.started = fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  // The order of the threads changes from barrier to barrier and from block to block: results that depend on it differ.
  for (unsigned phase = seed, left = threads; left > 0; ++phase) {
    for (unsigned t = 0; t < threads; ++t) resume(phase % 2 ? threads - 1 - t : t);
    unsigned done = 0;
    for (unsigned t = 0; t < threads; ++t) done += fibers[t].done;
    if (done > 0 && done < threads) throw std::runtime_error("a barrier that only some threads of the block reach");
    left = threads - done;
  }
}

}  // namespace

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.y != 1 || grid.z != 1) return cudaErrorInvalidValue;
  gridDim = grid;
  blockDim = block;
  body = &thread;
  for (blockIdx = {0, 0, 0}; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads, blockIdx.x);
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

void __syncthreads() {
  if (_setjmp(cuda_on_cpu::current->barrier) == 0) _longjmp(cuda_on_cpu::scheduler, 1);
}

extern "C" {

const char* cudaGetErrorString(cudaError_t) { return "an error"; }

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_library_init_impl(const char* space, const char*, const char* file, uint32_t line,
                                            TorchLibraryHandle* library) {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  const auto real = reinterpret_cast<decltype(&aoti_torch_library_init_impl)>(dlsym(torch, "aoti_torch_library_init_impl"));
  return real(space, "CPU", file, line, library);
}

}  // extern "C"
