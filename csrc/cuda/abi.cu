// The exported list of this library's C++ signatures (see tests/test_abi.py).
#include "../common/stable.h"

EFFVIT_DEFINE_ABI()
