#pragma once

#include <limits>

#define CUDART_NAN std::numeric_limits<double>::quiet_NaN()
