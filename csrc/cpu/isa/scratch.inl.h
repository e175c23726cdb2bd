// Scratch memory of a thread, laid out by the object that uses it. Included once per ISA, inside its target region.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {

// Bump allocator, every piece on a cache line of its own. Without memory to hand out it only counts.
class Scratch {
 public:
  explicit Scratch(char* base = nullptr) : base_(base) {}
  template <class U>
  U* take(int64_t n) {
    U* p = base_ ? reinterpret_cast<U*>(base_ + used_) : nullptr;
    used_ += (n * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Runs a pass whose constructor takes scratch: once to count it, once to be handed it.
template <class Pass, class Shape, class Plan, class... Args>
void run_pass(const Shape& shape, const Plan& plan, Args... args) {
  Scratch count;
  Pass sizes(shape, plan, count);
  Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
  Pass pass(shape, plan, scratch);
  pass.run(args...);
}

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
