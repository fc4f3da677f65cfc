// The device of device.h, and a LibTorch in which the CPU is a CUDA device: the bindings of csrc/cuda run as they are.
#include "device.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <stdexcept>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kGroup = 128, kRest = 6;  // threads of a warpgroup; rounds in which one rests

using Jump = void* [5];  // of the compiler's own jumps: contexts, whose switch saves a signal mask, take many times as long

struct Fiber {
  Jump barrier;
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStack);
  bool started = false, done, at_barrier;  // started once, a fiber runs the threads of one number of all later blocks
};

std::vector<Fiber> fibers(kMaxFibers);
unsigned first_block;  // of the cluster
Jump scheduler;
Fiber* current;
const std::function<void()>* body;
bool progress;  // some thread has done more than to look whether it may go on
std::deque<std::function<void()>> works;

[[noreturn, gnu::noinline]] void to_scheduler() { __builtin_longjmp(scheduler, 1); }
[[noreturn, gnu::noinline]] void to_fiber() { __builtin_longjmp(current->barrier, 1); }

[[gnu::noinline]] void leave() {
  if (__builtin_setjmp(current->barrier) == 0) to_scheduler();
}

void enter() {
  for (;; leave()) {
    (*body)();
    current->done = progress = true;
  }
}

[[gnu::noinline]] void start() {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack = {current->stack.get(), 0, kStack};
  makecontext(&context, enter, 0);
  current->started = true;
  setcontext(&context);
}

unsigned threads_of_block() { return blockDim.x * blockDim.y * blockDim.z; }

// Lets a thread run to where it waits next, or to its end.
[[gnu::noinline]] void resume(unsigned number) {
  const unsigned thread = number % threads_of_block();
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
  blockIdx = {first_block + number / threads_of_block(), 0, 0};
  current = &fibers[number];
  if (__builtin_setjmp(scheduler) != 0) return;
  if (current->started) to_fiber();
  start();
}

// Lets a block's threads pass a barrier that all have reached; returns those that have not ended.
unsigned pass_barrier(Fiber* block, unsigned threads) {
  unsigned left = 0, waiting = 0;
  for (Fiber* fiber = block; fiber < block + threads; ++fiber) left += !fiber->done, waiting += fiber->at_barrier;
  if (waiting == 0 || waiting < left) return left;
  if (left < threads) throw std::runtime_error("a barrier that only some threads of the block reach");
  for (Fiber* fiber = block; fiber < block + threads; ++fiber) fiber->at_barrier = false;
  progress = true;
  return left;
}

void run_cluster(unsigned blocks, unsigned threads_of_each, unsigned seed) {
  const unsigned threads = blocks * threads_of_each;
  for (unsigned t = 0; t < threads; ++t) fibers[t].done = fibers[t].at_barrier = false;
  // The order of the threads changes from round to round and from block to block: results that depend on it differ. One of
  // several blocks rests in each round, and one warpgroup of each block in many, or none, so that some are ahead of others.
  const unsigned groups = (threads_of_each + kGroup - 1) / kGroup;
  unsigned still = 0, resting = seed % (groups + 1), rested = 0;  // still: rounds without progress
  for (unsigned round = seed, left = threads; left > 0; ++round) {
    progress = false;
    left = 0;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned number = round % 2 ? threads - 1 - i : i;
      if (blocks > 1 && number / threads_of_each == round % blocks) continue;
      if (number % threads_of_each / kGroup == resting) continue;
      if (!fibers[number].done && !fibers[number].at_barrier) resume(number);
    }
    for (unsigned block = 0; block < blocks; ++block)
      left += pass_barrier(fibers.data() + block * threads_of_each, threads_of_each);
    still = progress ? 0 : still + 1;
    if (still > 0 || ++rested == kRest) resting = (resting + 1) % (groups + 1), rested = 0;
    if (still < blocks * (groups + 1)) continue;
    if (!works.empty()) {
      works.front()();
      works.pop_front();
      still = 0;
    } else if (left > 0) {
      throw std::runtime_error("every thread of the block waits for another");
    }
  }
  for (; !works.empty(); works.pop_front()) works.front()();
}

}  // namespace

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& thread, unsigned cluster) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.y != 1 || grid.z != 1) return cudaErrorInvalidValue;
  if (cluster == 0 || grid.x % cluster != 0 || cluster * threads > kMaxFibers) return cudaErrorInvalidValue;
  gridDim = grid;
  blockDim = block;
  body = &thread;
  try {
    for (first_block = 0; first_block < grid.x; first_block += cluster) run_cluster(cluster, threads, first_block / cluster);
  } catch (...) {
    for (Fiber& fiber : fibers) fiber.started = false;  // some are in the middle of a kernel
    throw;
  }
  return cudaSuccess;
}

unsigned fiber() { return static_cast<unsigned>(current - fibers.data()); }
unsigned rank() { return blockIdx.x - first_block; }

bool has_ended(unsigned rank) {
  const Fiber* block = fibers.data() + rank * threads_of_block();
  return std::all_of(block, block + threads_of_block(), [](const Fiber& fiber) { return fiber.done; });
}

void wait_until(const std::function<bool()>& condition) {
  while (!condition()) leave();
  progress = true;
}

void pause(int rounds) {
  for (; rounds > 0; --rounds) {
    leave();
    progress = true;
  }
}

void beside(std::function<void()> work) {
  if (blockIdx.x % 2 == 0) return work();
  works.push_back(std::move(work));
}

}  // namespace cuda_on_cpu

void __syncthreads() {
  cuda_on_cpu::current->at_barrier = true;
  cuda_on_cpu::leave();
  cuda_on_cpu::progress = true;
}

extern "C" {

const char* cudaGetErrorString(cudaError_t) { return "an error"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// Three multiprocessors, of Hopper's memory: blocks that walk tiles do so even over small tensors.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 << 10 : 3;
  return cudaSuccess;
}

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
