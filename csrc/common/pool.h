// Threads that share out tasks; results never depend on how many there are.
//
// Where torch has loaded OpenMP, its team does the work: those threads spin for milliseconds after each of torch's own
// calls, and a second set of threads would share the cores with them. Else a small pool of our own.
#pragma once

#include <cstdint>

namespace gsf {

// Runs task(context, i) for every i in [0, count), on the caller's thread and on up to threads - 1 others.
//
// A task writes only what belongs to its i, so that neither order nor thread changes a bit. It may throw
// std::bad_alloc, which is raised again here once all tasks have ended. Where our pool is at work for another caller,
// and for a count of 1, the caller's thread does it alone. A task itself asks for one thread only. Safe after fork():
// the child starts its own threads.
void parallel_for(int threads, int64_t count, void (*task)(void* context, int64_t i), void* context);

// The same for a callable.
template <typename Task>
void parallel(int threads, int64_t count, Task&& task) {
  parallel_for(
      threads, count, [](void* context, int64_t i) { (*static_cast<Task*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&task)));
}

}  // namespace gsf
