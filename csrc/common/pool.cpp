#include "common/pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

// OpenMP's own entry, which libgomp, libomp and libiomp5 all have; null where the program has loaded none of them.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* context, unsigned threads,
                                                    unsigned flags);

namespace gsf {
namespace {

struct Job {
  void (*task)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  void work() {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      if (failed.load()) continue;
      try {
        task(context, i);
      } catch (const std::bad_alloc&) {
        failed.store(true);
      }
    }
  }
};

class Pool {
 public:
  void run(int threads, Job& job) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      job.work();
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      job_ = &job;
      open_ = threads - 1;
    }
    wake_.notify_all();
    job.work();
    // A thread that has not woken by now is not waited for: it finds no job.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  // Threads start when they are first asked for; where the system refuses one, those that are there share its work.
  void grow(int wanted) {
    try {
      for (; size_ < wanted; ++size_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ != nullptr && open_ > 0; });
      Job* job = job_;
      --open_;
      ++active_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int open_ = 0, active_ = 0, size_ = 0;
};

// Never deleted: its threads wait in it until the process ends.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<bool> forked{false};

// A child of fork() has none of the threads, and perhaps a mutex that one of them held: it gets a new pool. OpenMP does
// not notice a fork and would wait for its threads.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  the_pool.store(nullptr);
  forked.store(true);
});

Pool& pool() {
  Pool* here = the_pool.load();
  if (here == nullptr) {
    Pool* fresh = new Pool;
    if (the_pool.compare_exchange_strong(here, fresh)) return *fresh;
    delete fresh;
  }
  return *here;
}

}  // namespace

void parallel_for(int threads, int64_t count, void (*task)(void*, int64_t), void* context) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  Job job;
  job.task = task;
  job.context = context;
  job.count = count;
  if (GOMP_parallel != nullptr && !forked.load()) {
    GOMP_parallel([](void* of) { static_cast<Job*>(of)->work(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    pool().run(threads, job);
  }
  if (job.failed.load()) throw std::bad_alloc();
}

}  // namespace gsf
