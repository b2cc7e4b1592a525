// Threads that share the tasks of one call after another.
//
// OpenMP, which torch uses, lets its threads sleep at once while a process has more of them than
// cores: a second thread of Python's that computes is enough. A token needs some 60 calls, so
// waking them takes longer than the work: with llama.cpp in the same process, 11 ms a token instead
// of 7. Threads of our own go on looking for work for a moment.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

class ThreadPool {
public:
    // Calls run(task) once for each task from 0 to tasks - 1, on this thread and others.
    //
    // The order is any. A thread that has not woken up does not delay the others. While another
    // call is under way, or after a fork, which takes no threads along, this thread does all tasks.
    template <class Run>
    void parallel(int64_t threads, uint32_t tasks, const Run& run) {
        std::unique_lock<std::mutex> only_caller(calls, std::try_to_lock);
        if (threads < 2 || tasks < 2 || !only_caller.owns_lock()) {
            for (uint32_t task = 0; task < tasks; task++) run(task);
            return;
        }
        for (; workers < threads - 1; workers++) std::thread([this] { work(); }).detach();

        context = &run;
        call = [](const void* context, uint32_t task) { (*(const Run*)context)(task); };
        finished = 0;
        round++;
        open = (uint64_t(round) << 32) | tasks;
        if (sleepers > 0) {
            std::lock_guard<std::mutex> lock(sleeping);
            work_is_there.notify_all();
        }
        while (take_one()) {
        }
        while (finished < tasks) pause();
    }

private:
    static constexpr auto SPINNING = std::chrono::microseconds(100);

    // The number of the call in the upper half, and in the lower one how many of its tasks nobody
    // has taken yet. A thread that comes late finds another number, and takes nothing.
    std::atomic<uint64_t> open{0};
    std::atomic<uint32_t> finished{0};  // tasks of this call
    uint32_t round = 0;
    int workers = 0;
    // These two change only while no task is open or unfinished.
    const void* context = nullptr;
    void (*call)(const void*, uint32_t) = nullptr;

    std::mutex calls;
    std::mutex sleeping;
    std::condition_variable work_is_there;
    std::atomic<int> sleepers{0};

    static uint32_t tasks_of(uint64_t state) { return uint32_t(state); }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    // Does one task, if one is open.
    bool take_one() {
        uint64_t state = open;
        while (tasks_of(state) > 0) {
            if (open.compare_exchange_weak(state, state - 1)) {
                call(context, tasks_of(state) - 1);
                finished++;
                return true;
            }
        }
        return false;
    }

    void work() {
        while (true) {
            auto idle_since = std::chrono::steady_clock::now();
            while (std::chrono::steady_clock::now() - idle_since < SPINNING) {
                for (int i = 0; i < 50 && tasks_of(open) == 0; i++) pause();
                while (take_one()) idle_since = std::chrono::steady_clock::now();
            }
            std::unique_lock<std::mutex> lock(sleeping);
            sleepers++;
            work_is_there.wait(lock, [this] { return tasks_of(open) > 0; });
            sleepers--;
        }
    }
};

inline ThreadPool& pool() {
    static ThreadPool* only = new ThreadPool;  // never destroyed, since its threads never end
    return *only;
}

// Calls run(i) for each i from 0 to count - 1, on several threads. Each takes a stretch of numbers
// at a time, short enough that a thread whose core is busy does not keep the others waiting.
template <class Run>
void each_of(int64_t count, int64_t threads, const Run& run) {
    const int64_t parts = std::min<int64_t>(count, 4 * threads);
    pool().parallel(threads, parts, [&](uint32_t part) {
        const int64_t end = count * (part + 1) / parts;
        for (int64_t i = count * part / parts; i < end; i++) run(i);
    });
}
