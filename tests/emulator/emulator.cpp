// Fibers of a block, and where they wait.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 << 10, kSharedBytes = 227 << 10;
constexpr int kMostThreads = 1024, kWarp = 32;

// Where some fibers meet, again and again.
struct Meeting {
  int expected = 0, arrived = 0;
  uint64_t round = 0;

  bool complete() const { return arrived > 0 && arrived == expected; }
  void begin_round() { arrived = 0, ++round; }
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;  // switching by it alone would take a system call each time
  jmp_buf state;
  bool started, done;
  const Meeting* waits_for;
  uint64_t round;  // of the meeting, which is over when this has changed
};

struct Warp {
  Meeting meeting;
  WarpWords given, seen;
};

alignas(1024) uint8_t shared[kSharedBytes];
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Meeting block;
jmp_buf scheduler;
int current;
const std::function<void()>* body;
int64_t blocks_run = 0;
std::function<void()> previous;  // the launch that has not run yet, if there is one
Meeting previous_ends;

void wait(const Meeting& meeting) {
  Fiber& fiber = fibers[current];
  fiber.waits_for = &meeting, fiber.round = meeting.round;
  if (_setjmp(fiber.state) == 0) _longjmp(scheduler, 1);
}

void open(Warp& warp) { warp.seen = warp.given, warp.meeting.begin_round(); }

void run_fiber() {
  (*body)();
  Warp& warp = warps[current / kWarp];
  fibers[current].done = true;
  --warp.meeting.expected, --block.expected;
  if (warp.meeting.complete()) open(warp);
  if (block.complete()) block.begin_round();
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  fiber.waits_for = nullptr;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Let every thread that can go on, forwards or backwards, so that their order is never the same for
// long.
bool pass(int threads, bool backwards) {
  bool any = false;
  for (int n = 0; n < threads; ++n) {
    current = backwards ? threads - 1 - n : n;
    Fiber& fiber = fibers[current];
    if (fiber.done || (fiber.waits_for && fiber.waits_for->round == fiber.round)) continue;
    threadIdx.x = current;
    resume(fiber);
    any = true;
  }
  return any;
}

// Run the launch before, while the fibers of this one stay where they are.
void run_previous() {
  const std::vector<uint8_t> saved(shared, shared + sizeof shared);
  std::vector<Fiber> own_fibers;
  std::vector<Warp> own_warps;
  own_fibers.swap(fibers), own_warps.swap(warps);
  const auto own = std::tuple(block, body, blockIdx);
  finish();
  std::tie(block, body, blockIdx) = own;
  own_fibers.swap(fibers), own_warps.swap(warps);
  std::copy(saved.begin(), saved.end(), shared);
  previous_ends.begin_round();
}

bool any_awaits_previous(int threads) {
  return std::any_of(fibers.begin(), fibers.begin() + threads, [](const Fiber& fiber) {
    return !fiber.done && fiber.waits_for == &previous_ends;
  });
}

void run_block(int threads) {
  std::memset(shared, 0xff, sizeof shared);
  warps.assign(threads / kWarp, {});
  for (Warp& warp : warps) warp.meeting.expected = kWarp;
  block = {threads};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.done = false;
    fiber.waits_for = nullptr;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, run_fiber, 0);
  }
  bool backwards = false;
  do {
    for (; pass(threads, backwards); backwards = !backwards) {
    }
  } while (previous && any_awaits_previous(threads) && (run_previous(), true));
  if (block.expected > 0) throw std::runtime_error("emulator: threads wait for ever");
}

}  // namespace

const WarpWords& exchange(const Words& words) {
  Warp& warp = warps[current / kWarp];
  warp.given[current % kWarp] = words;
  ++warp.meeting.arrived;
  if (warp.meeting.complete()) {
    open(warp);
  } else {
    wait(warp.meeting);
  }
  return warp.seen;
}

void synchronize() {
  ++block.arrived;
  if (block.complete()) {
    block.begin_round();
  } else {
    wait(block);
  }
}

uint8_t* shared_memory() { return shared; }

void await_previous() {
  if (previous) wait(previous_ends);
}

void finish() {
  if (previous) std::exchange(previous, nullptr)();
}

namespace {

void run(dim3 grid, int threads, const std::function<void()>& kernel) {
  if (threads % kWarp || threads > kMostThreads) throw std::runtime_error("emulator: block size");
  if (static_cast<int>(fibers.size()) < threads) fibers.resize(threads);
  body = &kernel;
  threadIdx = {0, 0, 0};
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(threads);
        ++blocks_run;
      }
    }
  }
}

}  // namespace

void launch(dim3 grid, int threads, std::function<void()> kernel, bool overlaps) {
  if (overlaps) {
    run(grid, threads, kernel);
    if (previous) throw std::runtime_error("emulator: a launch did not await what it overlaps");
  } else {
    finish();
    previous = [=] { run(grid, threads, kernel); };
  }
}

}  // namespace emulator

// How many blocks ran so far.
extern "C" int64_t emulated_blocks() { return emulator::blocks_run; }
