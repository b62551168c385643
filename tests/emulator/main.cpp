// Runs the kernels' suites. With BITNET_WHOLE_MODEL: the whole-model suite, a program of its own because it includes
// every kernel again.
//   kernels [thinning] [linear|attention|head]     thinning n: every n-th case (sanitizer runs)
#include "harness.h"

int linear_suites();
int attention_suites();
int head_suites();
int model_suites();

int main(int argc, char** argv) {
    harness::set_up();
    if (argc > 1) harness::thinning() = std::max(1, std::atoi(argv[1]));
    std::string only = argc > 2 ? argv[2] : "";
    int failures = 0;
#ifdef BITNET_WHOLE_MODEL
    failures += model_suites();
#else
    if (only.empty() || only == "linear") failures += linear_suites();
    if (only.empty() || only == "attention") failures += attention_suites();
    if (only.empty() || only == "head") failures += head_suites();
#endif
    std::printf(failures ? "FAILED: %d mismatches\n" : "all suites ok\n", failures);
    return failures ? 1 : 0;
}
