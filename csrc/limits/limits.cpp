#include "limits/limits.h"

#include <atomic>

#include "parallel.h"

namespace pyengine {

int64_t run_limit(Limit limit, const LimitArgs& args, int64_t threads) {
  const int64_t unit = 64 * args.streams, part = args.bytes / threads / unit * unit;
  std::atomic<int64_t> done{0};
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) {
      LimitArgs own = args;
      own.data += thread * part;
      own.bytes = part;
      done += limit(own);
    }
  });
  return done;
}

}  // namespace pyengine
