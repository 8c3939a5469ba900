#include "gpsa.h"

namespace convit {

const char* instruction_set() { return "portable"; }

}  // namespace convit
