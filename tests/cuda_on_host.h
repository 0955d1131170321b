#pragma once

#undef _FORTIFY_SOURCE  // which takes jumps between stacks for mistakes
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <numbers>
#include <stdexcept>
#include <vector>

// CUDA's threads as fibers of one thread of the host, so that device code of blocks can be tested without a GPU.
// Included in front of the code to test.

#define __device__
#define __host__

struct Dimensions {
  unsigned x;
};
inline Dimensions threadIdx, blockIdx, blockDim;

namespace host {

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Fiber {
  static constexpr int kStack = 1 << 16;
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool begun = false, done;
  bool turn = false;                 // changes with each shuffle
  const Barrier* barrier = nullptr;  // that it waits for, until its generation is another
  int generation;

  bool waits() const { return barrier && barrier->generation == generation; }
};

// The blocks that run; those after them take the same fibers.
inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline size_t current;  // number of the thread in the grid
inline std::function<void()> body;
inline Barrier grid;
inline std::vector<Barrier> blocks, warps;

inline void leave() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  for (;; leave()) {
    body();
    fibers[current].done = true;
  }
}

[[gnu::noinline]] inline void enter(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = Fiber::kStack;
  makecontext(&fiber.context, &run_fiber, 0);
  setcontext(&fiber.context);
}

inline void wait(Barrier& barrier, int size) {
  if (++barrier.arrived == size) {
    barrier.arrived = 0, ++barrier.generation;
    return;
  }
  fibers[current].barrier = &barrier, fibers[current].generation = barrier.generation;
  leave();
}

inline void wait_for_warp() { wait(warps[current / 32], 32); }
inline void wait_for_grid() { wait(grid, int(fibers.size())); }

// Runs a function in each thread of blocks that may wait for each other: a warp as far as it gets, then the next, in
// turns from the first and from the last, so that a barrier that is missing shows. A thread that waits for one that has
// ended is an error.
inline void run_grid(unsigned num_blocks, unsigned threads, const std::function<void()>& function) {
  const unsigned count = num_blocks * threads / 32;
  fibers.resize(num_blocks * threads);
  blockDim.x = threads;
  body = function;
  grid = {};
  blocks.assign(num_blocks, {}), warps.assign(count, {});
  for (Fiber& fiber : fibers) fiber.done = false, fiber.barrier = nullptr;
  for (bool left = true, moved = true, backwards = false; left; backwards = !backwards) {
    if (!moved) throw std::runtime_error("a thread waits for one that has ended");
    left = moved = false;
    for (unsigned i = 0; i < count; ++i)
      for (bool progress = true; progress; moved |= progress) {
        progress = false;
        for (unsigned lane = 0; lane < 32; ++lane) {
          current = (backwards ? count - 1 - i : i) * 32 + lane;
          threadIdx.x = current % threads, blockIdx.x = current / threads;
          Fiber& fiber = fibers[current];
          left |= !fiber.done;
          if (!fiber.done && !fiber.waits()) enter(fiber), progress = true;
        }
      }
  }
}

inline void run_block(unsigned threads, const std::function<void()>& function) { run_grid(1, threads, function); }

}  // namespace host

inline void __syncthreads() { host::wait(host::blocks[blockIdx.x], int(blockDim.x)); }

// Two sets of values take turns, so that nobody writes what another has yet to read.
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  static std::vector<T> values[2];
  std::vector<T>& given = values[host::fibers[host::current].turn ^= true];
  if (given.size() < host::fibers.size()) given.resize(host::fibers.size());
  given[host::current] = value;
  host::wait_for_warp();
  return given[host::current ^ size_t(distance)];
}

using std::max, std::min;

template <typename real_t>
void sincospi(real_t x, real_t* sine, real_t* cosine) {
  *sine = std::sin(std::numbers::pi_v<real_t> * x), *cosine = std::cos(std::numbers::pi_v<real_t> * x);
}
