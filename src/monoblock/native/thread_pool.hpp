// The threads of a build without OpenMP (Apple's clang has none): workers that are started at the first use and wait for the
// next call.
#pragma once

#if !defined(_OPENMP)

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace decode {

class ThreadPool {
 public:
  // The process's pool. A child process starts its own: it inherits the memory of its parent's, but not the threads.
  static ThreadPool& get() {
    static std::atomic<ThreadPool*> current{nullptr};
    ThreadPool* found = current.load(std::memory_order_acquire);
    while (!found || found->process != getpid()) {
      // Never deleted: its threads, or another of the child's threads, may still use it.
      ThreadPool* made = new ThreadPool;
      if (current.compare_exchange_strong(found, made)) return *made;
      delete made;  // without threads yet; `found` is another thread's
    }
    return *found;
  }

  // Calls work(thread) on `threads` threads, of which the caller is the first, after prepare(their number). There are fewer
  // where the system gives no more, and the caller alone while another thread uses the pool.
  void run(int threads, const std::function<void(int)>& prepare, const std::function<void(int)>& work) {
    if (threads <= 1 || busy.exchange(true, std::memory_order_acquire)) {
      prepare(1);
      return work(0);
    }
    for (; started < threads - 1; ++started) try {
        std::thread([this, number = started + 1] { serve(number); }).detach();
      } catch (const std::system_error&) {
        break;
      }
    const int count = started + 1 < threads ? started + 1 : threads;
    prepare(count);
    {
      std::lock_guard<std::mutex> lock(mutex);
      job = &work, members = count, running = count - 1, ++calls;
    }
    wake.notify_all();
    work(0);
    {
      std::unique_lock<std::mutex> lock(mutex);
      done.wait(lock, [&] { return !running; });
    }
    busy.store(false, std::memory_order_release);
  }

 private:
  // A worker: takes part in each call that has more threads than its number.
  void serve(int number) {
    std::unique_lock<std::mutex> lock(mutex);
    for (int64_t seen = 0;;) {
      wake.wait(lock, [&] { return calls != seen; });
      seen = calls;
      if (number >= members) continue;
      const std::function<void(int)>& work = *job;
      lock.unlock();
      work(number);
      lock.lock();
      if (!--running) done.notify_one();
    }
  }

  const pid_t process = getpid();
  std::atomic<bool> busy{false};
  int started = 0;  // workers; changed only by the caller that holds `busy`
  std::mutex mutex;
  std::condition_variable wake, done;
  const std::function<void(int)>* job = nullptr;
  int members = 0, running = 0;  // of the call, with the caller; its workers that have not returned
  int64_t calls = 0;
};

}  // namespace decode

#endif
