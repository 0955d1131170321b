#pragma once

#undef _FORTIFY_SOURCE  // which takes jumps between stacks for mistakes
#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

// CUDA's threads as fibers of one thread of the host, so that device code of blocks can be tested without a GPU.
// Included in front of the code to test.

#define __device__
#define __host__

struct Dimensions {
  unsigned x;
};
inline Dimensions threadIdx;

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
};

// The block that runs; blocks follow each other on the same fibers.
inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline Barrier all;
inline std::vector<Barrier> warps;
inline bool progress;

inline void leave() {
  if (_setjmp(fibers[threadIdx.x].place) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  for (;; leave()) {
    body();
    fibers[threadIdx.x].done = progress = true;
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
  progress = true;
  const int generation = barrier.generation;
  if (++barrier.arrived == size) {
    barrier.arrived = 0, ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) leave();
}

inline void wait_for_warp() { wait(warps[threadIdx.x / 32], 32); }

// Runs a function in each thread of a block: a warp as far as it gets, then the next, in turns from the first and from
// the last, so that a barrier that is missing shows. A thread that waits for one that has ended is an error.
inline void run_block(unsigned threads, const std::function<void()>& function) {
  fibers.resize(threads);
  body = function;
  all = {};
  warps.assign(threads / 32, {});
  for (Fiber& fiber : fibers) fiber.done = false;
  const unsigned count = threads / 32;
  for (bool left = true, moved = true, backwards = false; left; backwards = !backwards) {
    if (!moved) throw std::runtime_error("a thread waits for one that has ended");
    left = moved = false;
    for (unsigned i = 0; i < count; ++i) {
      do {
        progress = false;
        for (unsigned lane = 0; lane < 32; ++lane) {
          threadIdx.x = (backwards ? count - 1 - i : i) * 32 + lane;
          Fiber& fiber = fibers[threadIdx.x];
          if (!fiber.done) enter(fiber), left = true;
        }
        moved |= progress;
      } while (progress);
    }
  }
}

}  // namespace host

inline void __syncthreads() { host::wait(host::all, int(host::fibers.size())); }
