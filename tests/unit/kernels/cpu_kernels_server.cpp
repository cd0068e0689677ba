// Runs kernels for a program on another processor (cpu_kernels_elsewhere.py): reads calls from
// standard input, each with its memory, and writes that memory back.
#include <sys/mman.h>

#include <cstdio>
#include <utility>

#include "kernels.h"

extern "C" {
int mone_best_set();
int mone_interface_version();
const MoneKernels* mone_kernels(int set);
}

namespace {

constexpr int64_t kMemory = 1 << 28;  // its address is told first: pointers in calls lie in it
constexpr int kMost = 16;             // arguments; a kernel does not see those it has not

struct Call {
    int64_t kernel, bytes, arguments[kMost];
};

template <std::size_t... I>
void run(int64_t kernel, const int64_t* arguments, std::index_sequence<I...>) {
    reinterpret_cast<void (*)(decltype(static_cast<int64_t>(I))...)>(kernel)(arguments[I]...);
}

}  // namespace

int main() {
    void* memory = mmap(nullptr, kMemory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const int64_t* table = reinterpret_cast<const int64_t*>(mone_kernels(mone_best_set()));
    const int64_t hello[] = {reinterpret_cast<int64_t>(memory), mone_interface_version(), table[0],
                             table[1]};
    if (memory == MAP_FAILED || !fwrite(hello, sizeof hello, 1, stdout)) return 1;
    for (Call call; !fflush(stdout) && fread(&call, sizeof call, 1, stdin);) {
        if (call.bytes > kMemory || !fread(memory, call.bytes, 1, stdin)) return 1;
        run(table[call.kernel], call.arguments, std::make_index_sequence<kMost>());
        if (!fwrite(memory, call.bytes, 1, stdout)) return 1;
    }
}
