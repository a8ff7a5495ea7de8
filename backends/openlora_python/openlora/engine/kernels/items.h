// Who does what of a phase of work. Each thread takes the items of its own share first, in their order, so that weights
// stream; then those left at the ends of the others' shares, so that a thread which the system put off for a while does
// not hold up the rest. Which thread computes an item never changes its result.

#pragma once

#include <atomic>
#include <cstdint>

namespace {

struct alignas(64) Taken {  // of one thread's share in one phase
    std::atomic<uint64_t> ends{0};  // low half: from its front; high half: from its back
};

// One thread among those of a step. All threads go through the same phases in the same order.
struct Member {
    int thread, team;
    Taken* phases;  // [phases left, team]
};

class Items {
  public:
    Items(Member& member, int64_t count) : taken(member.phases), count(count), thread(member.thread), team(member.team) {
        member.phases += team;
    }

    // The next item for this thread; −1: all are taken.
    int64_t take() {
        for (; step < team; step++) {
            const int owner = (thread + step) % team;
            const int64_t first = count * owner / team;
            const uint64_t size = count * (owner + 1) / team - first;
            std::atomic<uint64_t>& ends = taken[owner].ends;
            uint64_t seen = ends.load(std::memory_order_relaxed);
            while ((seen & LOW) + (seen >> 32) < size)
                if (ends.compare_exchange_weak(seen, seen + (step ? LOW + 1 : 1), std::memory_order_relaxed))
                    return step ? first + int64_t(size - 1 - (seen >> 32)) : first + int64_t(seen & LOW);
        }
        return -1;
    }

  private:
    static constexpr uint64_t LOW = 0xffffffff;
    Taken* taken;
    int64_t count;
    int thread, team, step = 0;  // shares that this thread is through with
};

// Take all items, knowing the next one (−1: none) while one is worked on, so that its weights can be fetched meanwhile.
template <typename Work>
void take_each(Items items, Work work) {
    for (int64_t item = items.take(), next; item >= 0; item = next) {
        next = items.take();
        work(item, next);
    }
}

}  // namespace
