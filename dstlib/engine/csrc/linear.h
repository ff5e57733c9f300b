// Structs of the linear kernels.
#pragma once
#include "engine.h"
