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

constexpr size_t kStack = 128 << 10, kApart = 7 * 64;
constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kGroup = 128, kRest = 6;  // threads of a warpgroup; rounds in which one rests

using Jump = void* [5];  // of the compiler's own jumps: contexts, whose switch saves a signal mask, take many times as long

struct Fiber {
  Jump barrier;
  const std::function<bool()>* condition;  // that it waits for
  uint3 thread;
  bool started = false, done, at_barrier;  // started once, a fiber runs the threads of one number of all later blocks
};

std::vector<Fiber> fibers(kMaxFibers);
// Not a power of two apart: the ends of the stacks, which are all that most use, would share a few lines of the caches.
const auto stacks = std::make_unique_for_overwrite<char[]>(kMaxFibers * (kStack + kApart));
unsigned first_block;  // of the cluster
Jump scheduler;
Fiber* current;
const std::function<void()>* body;
bool progress;  // some thread has done more than to look whether it may go on
std::deque<std::function<void()>> works;

[[noreturn, gnu::noinline]] void to_scheduler() { __builtin_longjmp(scheduler, 1); }

[[gnu::noinline]] void leave() {
  if (__builtin_setjmp(current->barrier) == 0) to_scheduler();
}

void enter() {
  for (;; leave()) {
    (*body)();
    current->done = progress = true;
  }
}

// To the current fiber, where it waits or at its start.
[[noreturn, gnu::noinline]] void to_fiber() {
  if (current->started) __builtin_longjmp(current->barrier, 1);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack = {stacks.get() + (current - fibers.data()) * (kStack + kApart), 0, kStack};
  makecontext(&context, enter, 0);
  current->started = true;
  setcontext(&context);
  std::abort();
}

unsigned threads_of_block() { return blockDim.x * blockDim.y * blockDim.z; }

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

// Lets threads of one block run, each to where it waits next, or to its end; in either order. The jumps are here, and in
// __syncthreads: to return from another function behind each would take as long again.
[[gnu::noinline]] void run_threads(unsigned block, Fiber* first, Fiber* end, bool backwards) {
  blockIdx = {first_block + block, 0, 0};
  for (Fiber *next = backwards ? end - 1 : first, *const stop = backwards ? first - 1 : end; next != stop;
       next += backwards ? -1 : 1) {
    if (next->done || next->at_barrier || (next->condition != nullptr && !(*next->condition)())) continue;
    threadIdx = next->thread;
    current = next;
    if (__builtin_setjmp(scheduler) == 0) to_fiber();
  }
}

void run_cluster(unsigned blocks, unsigned threads_of_each, unsigned seed) {
  const unsigned threads = blocks * threads_of_each;
  for (unsigned t = 0; t < threads; ++t) {
    const unsigned thread = t % threads_of_each, row = thread / blockDim.x;
    fibers[t].thread = {thread % blockDim.x, row % blockDim.y, row / blockDim.y};
    fibers[t].done = fibers[t].at_barrier = false;
    fibers[t].condition = nullptr;
  }
  // The order of the threads changes from round to round and from block to block: results that depend on it differ. One of
  // several blocks rests in each round, and one warpgroup of each block in many, or none, so that some are ahead of others.
  const unsigned groups = (threads_of_each + kGroup - 1) / kGroup;
  unsigned still = 0, resting = seed % (groups + 1), rested = 0;  // still: rounds without progress
  for (unsigned round = seed, left = threads; left > 0; ++round) {
    const bool backwards = round % 2 == 1;
    progress = false;
    left = 0;
    for (unsigned i = 0; i < blocks * groups; ++i) {
      const unsigned number = backwards ? blocks * groups - 1 - i : i, block = number / groups, group = number % groups;
      if ((blocks > 1 && block == round % blocks) || group == resting) continue;
      Fiber* const first = fibers.data() + block * threads_of_each;
      run_threads(block, first + group * kGroup, first + std::min((group + 1) * kGroup, threads_of_each), backwards);
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
  if (!condition()) {
    current->condition = &condition;  // which is looked at in this one's place
    leave();
    current->condition = nullptr;
  }
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
  using namespace cuda_on_cpu;
  current->at_barrier = true;
  if (__builtin_setjmp(current->barrier) == 0) to_scheduler();
  progress = true;
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
