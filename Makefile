# For machines without CMake: an addon for the CPU alone. CMakeLists.txt is the build that knows CUDA;
# test/build.test.ts holds the two to the same flags.
NODE ?= node
ifeq ($(origin CXX),default)
  CXX = c++
endif
INCLUDES := -I. $(shell $(NODE) -p "['node-api-headers', 'node-addon-api'].map((name) => \
  '-isystem ' + path.resolve(require(name).include_dir)).join(' ')")
CPPFLAGS += $(INCLUDES) -DNDEBUG -MMD -MP
CXXFLAGS += -O3 -std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra

NODE_API = -DP2R_VERSION=$(shell $(NODE) -p "require('./package.json').version") \
  -DNAPI_VERSION=9 -DNODE_ADDON_API_CPP_EXCEPTIONS -DNODE_ADDON_API_CPP_EXCEPTIONS_ALL \
  -DNODE_ADDON_API_REQUIRE_BASIC_FINALIZERS -DNODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS
SIMD = -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-maybe-uninitialized
# As in CMakeLists.txt, where the reason is.
scalar = $(if $(filter x86_64 amd64,$(machine)),-Os)
avx2 = -mavx2 -mfma -mf16c
avx512 = -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512

machine := $(shell uname -m)
ifneq ($(filter x86_64 amd64,$(machine)),)
  ISAS = scalar avx2 avx512
else ifneq ($(filter aarch64 arm64,$(machine)),)
  ISAS = neon
else
  ISAS = scalar
endif
ifeq ($(shell uname -s),Darwin)
  LDFLAGS += -undefined dynamic_lookup
endif

out = build/make
sources := $(filter-out cpu/simd/%,$(wildcard ops/*.cpp cpu/*.cpp cpu/*/*.cpp binding/*.cc)) \
  cpu/simd/select.cpp cuda/none.cpp
kernels := $(filter-out cpu/simd/select.cpp,$(wildcard cpu/simd/*.cpp))
objects := $(sources:%=$(out)/%.o) $(foreach isa,$(ISAS),$(kernels:%=$(out)/$(isa)/%.o))

build/Release/p2r_kernels.node: $(objects)
	@mkdir -p $(@D)
	$(CXX) -shared -pthread $(LDFLAGS) -o $@ $^

$(sources:%=$(out)/%.o): $(out)/%.o: %
	@mkdir -p $(@D)
	$(CXX) $(CPPFLAGS) $(CXXFLAGS) -ffp-contract=off $(if $(filter binding/%,$<),-Os $(NODE_API)) -c -o $@ $<

define simd_kernels
$(kernels:%=$(out)/$(1)/%.o): $(out)/$(1)/%.o: %
	@mkdir -p $$(@D)
	$$(CXX) $$(CPPFLAGS) $$(CXXFLAGS) $$(SIMD) $$($(1)) -DP2R_ISA=$(1) -c -o $$@ $$<
endef
$(foreach isa,$(ISAS),$(eval $(call simd_kernels,$(isa))))

-include $(objects:.o=.d)
