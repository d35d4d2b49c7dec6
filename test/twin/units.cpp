#include "test/twin/harness.h"
int main() {}
