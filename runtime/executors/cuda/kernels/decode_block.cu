// What lies between two attentions of a decode step, for 1 to 8 tokens, in one launch: the
// attention's output projection, the MLP, and the next layer's q/k/v projection.
//
// Reading the weights is all that takes time here, so they must flow without a pause. Every thread
// copies the bytes that it will itself multiply into a ring of its own in shared memory
// (cp.async), SLOTS - 1 steps ahead. Weights depend on nothing, so these copies run on through the
// barriers between the four products, while sums are added up and inputs are normalized.
//
// One block of WARPS warps per multiprocessor. A block makes an equal share of the output channels;
// its warps divide the inputs (K) and add up their sums in a fixed order. The tensor cores take 16
// channels x 8 tokens; as a product may be summed in any order of K, a thread reads 16 consecutive
// bytes of weights and of inputs and hands them over as they come.
//
// Defined by the compiler's caller (decode_block.py): TOKENS (1 to 8), WARPS (TOKENS or more), SLOTS,
// HIDDEN (a multiple of 64), SHARED_BYTES, FP8 (else INT8 codes), BF16 (else float16 values).

typedef unsigned char Code;
typedef unsigned short Value;  // bits of a bfloat16 or float16

constexpr int THREADS = 32 * WARPS;
constexpr int TILE = 16;    // channels of one matrix instruction
constexpr int CHUNK = 64;   // inputs of one step: 16 of each of the four threads that share a channel
constexpr int PART = 512;   // bytes that a warp copies at once
constexpr int WEIGHTS = 4 * PART;           // of a step: two tiles of one chunk
constexpr int SLOT = WEIGHTS + CHUNK * TOKENS;  // and the tokens' inputs
constexpr int RING = SLOTS * SLOT;
// Tokens' codes lie half of the 32 banks apart, so that two of them can be read at once.
constexpr int CODE_STRIDE = HIDDEN + (HIDDEN % 128 == 0 ? 64 : 0);
constexpr int VECTORS = (HIDDEN / 8 + THREADS - 1) / THREADS;

#if FP8
typedef float Sum;
#else
typedef int Sum;
#endif

struct Linear {
    const Code* weight;  // [channels, depth]
    const float* scale;  // [channels]
    const Value* bias;   // [channels] or null
    int channels;
    int depth;           // a multiple of CHUNK
};

struct Encoding {
    const float* smoothing;  // or null
    float scale;
};

struct Norm {
    const Value* weight;
    Encoding encoding;
};

struct Params {
    Linear products[4];  // output, gate above up, down, q/k/v of the next layer
    Norm norms[2];       // before gate/up, before q/k/v
    Encoding gated;      // of what down reads
    const Code* mixed;   // [TOKENS, output.depth]: what the attention made
    Value* hidden;       // [TOKENS, HIDDEN], updated in place
    Code* inner;         // [TOKENS, down.depth]
    Value* qkv;          // [TOKENS, q/k/v channels]
    unsigned* barrier;   // 0 at first; every launch leaves it at 0 or 2^31
    // The weights that the next launch reads first, of its output projection and gate above up.
    const Code* ahead[2];
    int ahead_groups;    // how many groups of each block's channels of gate and up
    float epsilon;
    int count;           // products: 3 after the last layer
};

enum Product { OUTPUT, GATE_UP, DOWN, QKV };
enum Result { RESIDUAL, GATED, PLAIN };

struct __align__(16) Shared {
    // Of the threads in turn; a thread's copies are read by itself alone.
    unsigned char rings[WARPS * RING];
    unsigned char codes[TOKENS * CODE_STRIDE];
    // One set of sums is added up while the warps write the other.
    Sum sums[2][2][WARPS][TILE * TOKENS];
    float squares[TOKENS][WARPS];
};

static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch asks for too little shared memory");

// ---- Values and codes, rounded as the other kernels do (formats.py) ----

__device__ __forceinline__ float to_float(Value bits) {
#if BF16
    return __uint_as_float(unsigned(bits) << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

__device__ __forceinline__ Value to_value(float value) {
    Value bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

__device__ __forceinline__ float rounded(float value) { return to_float(to_value(value)); }

__device__ __forceinline__ float divided(float value, float by) {
    float result;
    asm("div.full.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(by));
    return result;
}

__device__ __forceinline__ Code to_code(float value, const Encoding& encoding, int channel) {
    if (encoding.smoothing) value *= __ldg(encoding.smoothing + channel);
    value = divided(value, encoding.scale);
#if FP8
    Value pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
    return Code(pair);
#else
    return Code(__float2int_rn(fminf(fmaxf(value, -128.0f), 127.0f)));
#endif
}

// ---- Memory ----

__device__ __forceinline__ void copy16(unsigned to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
                 : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 read_shared(unsigned at) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(at)
                 : "memory");
    return value;
}

// What other blocks wrote is read from the L2 cache.
__device__ __forceinline__ Value read_value(const Value* at) {
    Value value;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(value) : "l"(at) : "memory");
    return value;
}

__device__ __forceinline__ uint4 read_values(const Value* at) {
    uint4 value;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(at)
                 : "memory");
    return value;
}

// Everything before is seen by every block after. All blocks must be running: there are as many as
// multiprocessors, each has room for one, and none waits for anything that comes after this launch.
__device__ __forceinline__ void await_all_blocks(unsigned* barrier) {
    __syncthreads();
    if (threadIdx.x == 0) {
        // All shares add up to 2^31, which turns the highest bit: nothing has to be reset.
        const unsigned share = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        unsigned before, now;
        __threadfence();
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                     : "=r"(before)
                     : "l"(barrier), "r"(share)
                     : "memory");
#ifdef SPIN_LIMIT
        int spins = 0;
#endif
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                         : "=r"(now)
                         : "l"(barrier)
                         : "memory");
#ifdef SPIN_LIMIT
            if (++spins > SPIN_LIMIT) asm volatile("trap;");
#endif
        } while (((before ^ now) & 0x80000000u) == 0);
    }
    __syncthreads();
}

// ---- The order of work ----

__device__ __forceinline__ int share_start(int total, int index, int parts) {
    return int(unsigned(total) * unsigned(index) / unsigned(parts));
}

// One warp's part of one product: its block's channels and its inputs, in steps of a group of two
// tiles (of gate and up: a tile of each) and one chunk.
struct Share {
    int row, row_end, group_rows;
    int chunk_start, chunk_end;

    __device__ __forceinline__ Share(const Linear& linear, bool paired) {
        const int rows = paired ? linear.channels / 2 : linear.channels;
        row = share_start(rows, blockIdx.x, gridDim.x);
        row_end = share_start(rows, blockIdx.x + 1, gridDim.x);
        group_rows = paired ? TILE : 2 * TILE;
        chunk_start = share_start(linear.depth / CHUNK, threadIdx.x / 32, WARPS);
        chunk_end = share_start(linear.depth / CHUNK, threadIdx.x / 32 + 1, WARPS);
    }
};

__device__ __forceinline__ unsigned next_slot(unsigned slot, unsigned ring) {
    slot += SLOT;
    return slot == ring + RING ? ring : slot;
}

// Copies weights, in the order in which `multiply` will want them, through all products.
struct Reader {
    const Params& params;
    const unsigned ring;
    unsigned slot;
    int product;
    Share share;
    int chunk;
    const Code* at;      // this thread's 16 bytes of the first tile
    long long depth8;    // bytes to the channel 8 below
    long long tile2;     // bytes to the second tile
    bool has[4];

    __device__ __forceinline__ Reader(const Params& params, unsigned ring)
        : params(params), ring(ring), slot(ring), product(OUTPUT), share(params.products[0], false) {
        begin_product();
    }

    // To the first group of the product, or of the next that has channels for this block.
    __device__ __forceinline__ void begin_product() {
        while (share.row >= share.row_end) {
            if (++product >= params.count) return;
            share = Share(params.products[product], product == GATE_UP);
        }
        begin_group();
    }

    __device__ __forceinline__ void begin_group() {
        const Linear& linear = params.products[product];
        const int lane = threadIdx.x % 32, row = share.row + lane / 4;
        const bool paired = product == GATE_UP;
        chunk = share.chunk_start;
        depth8 = 8ll * linear.depth;
        tile2 = (long long)linear.depth * (paired ? linear.channels / 2 : TILE);
        at = linear.weight + (long long)row * linear.depth + chunk * CHUNK + lane % 4 * 16;
        has[0] = row < share.row_end;
        has[1] = row + 8 < share.row_end;
        has[2] = paired ? has[0] : row + TILE < share.row_end;
        has[3] = paired ? has[1] : row + TILE + 8 < share.row_end;
    }

    // Copies the next step, with the tokens' inputs if they are there already (else null).
    __device__ __forceinline__ void copy(const Code* inputs, int current) {
        if (product < params.count) {
            const int lane = threadIdx.x % 32;
            const unsigned to = slot + lane * 16;
            if (has[0]) copy16(to, at);
            if (has[1]) copy16(to + PART, at + depth8);
            if (has[2]) copy16(to + 2 * PART, at + tile2);
            if (has[3]) copy16(to + 3 * PART, at + tile2 + depth8);
            if (inputs && product == current && lane < 4 * TOKENS) copy_inputs(slot, inputs, chunk);
            at += CHUNK;
            if (++chunk == share.chunk_end) {
                share.row += share.group_rows;
                if (share.row < share.row_end) begin_group();
                else begin_product();
            }
        }
        end_copies();
        slot = next_slot(slot, ring);
    }

    __device__ __forceinline__ void copy_inputs(unsigned to, const Code* inputs, int from) {
        const int lane = threadIdx.x % 32;
        const int depth = params.products[product].depth;
        copy_inputs_of(to, inputs, from, depth, lane);
    }

    static __device__ __forceinline__ void copy_inputs_of(
        unsigned to, const Code* inputs, int from, int depth, int lane) {
        copy16(to + WEIGHTS + lane * 16,
               inputs + (long long)(lane / 4) * depth + from * CHUNK + lane % 4 * 16);
    }
};

// ---- Products ----

#if FP8
// Two FP8 codes as float16 values: exact. Hopper has no FP8 instruction for so few tokens; in
// float16 its products are exact and sums are float32.
__device__ __forceinline__ void widen(unsigned codes, unsigned& low, unsigned& high) {
    asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.rn.f16x2.e4m3x2 %0, l;\n"
        " cvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(low), "=r"(high)
        : "r"(codes));
}

struct Inputs {
    unsigned values[8];
};

__device__ __forceinline__ Inputs prepared(uint4 codes) {
    Inputs inputs;
    widen(codes.x, inputs.values[0], inputs.values[1]);
    widen(codes.y, inputs.values[2], inputs.values[3]);
    widen(codes.z, inputs.values[4], inputs.values[5]);
    widen(codes.w, inputs.values[6], inputs.values[7]);
    return inputs;
}

__device__ __forceinline__ void multiply(Sum (&sums)[4], unsigned upper, unsigned lower,
                                         unsigned first, unsigned second) {
    unsigned a[4];
    widen(upper, a[0], a[2]);
    widen(lower, a[1], a[3]);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second));
}

__device__ __forceinline__ void multiply(Sum (&sums)[4], uint4 upper, uint4 lower,
                                         const Inputs& inputs) {
    const unsigned* in = inputs.values;
    multiply(sums, upper.x, lower.x, in[0], in[1]);
    multiply(sums, upper.y, lower.y, in[2], in[3]);
    multiply(sums, upper.z, lower.z, in[4], in[5]);
    multiply(sums, upper.w, lower.w, in[6], in[7]);
}
#else
typedef uint4 Inputs;

__device__ __forceinline__ Inputs prepared(uint4 codes) { return codes; }

__device__ __forceinline__ void multiply(Sum (&sums)[4], unsigned a0, unsigned a1, unsigned a2,
                                         unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(Sum (&sums)[4], uint4 upper, uint4 lower,
                                         const Inputs& inputs) {
    multiply(sums, upper.x, lower.x, upper.y, lower.y, inputs.x, inputs.y);
    multiply(sums, upper.z, lower.z, upper.w, lower.w, inputs.z, inputs.w);
}
#endif

// The sum of all warps for one channel and token.
__device__ __forceinline__ float total(const Sum (&sums)[WARPS][TILE * TOKENS], int place) {
    Sum sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += sums[warp][place];
    return float(sum);
}

// One product for this block's channels, from the tokens' codes in shared memory (`inputs` null) or
// in global memory.
template <Result RESULT>
__device__ __forceinline__ void run_product(const Params& params, Shared& shared, Reader& reader,
                                            unsigned& slot, int& buffer, int product,
                                            const Code* inputs, Value* out) {
    const Linear& linear = params.products[product];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int token = lane / 4, part = lane % 4;
    Share share(linear, RESULT == GATED);
    const int chunks = share.chunk_end - share.chunk_start;
    bool waiting = inputs != nullptr;
    if (inputs) {
        // The weights of the first steps were copied before there were inputs.
        const int groups = (share.row_end - share.row + share.group_rows - 1) / share.group_rows;
        unsigned to = slot;
        for (int step = 0, chunk = 0; step < min(SLOTS - 1, groups * chunks); ++step) {
            if (lane < 4 * TOKENS)
                Reader::copy_inputs_of(to, inputs, share.chunk_start + chunk, linear.depth, lane);
            to = next_slot(to, reader.ring);
            if (++chunk == chunks) chunk = 0;
        }
        end_copies();
    }
    const unsigned codes = unsigned(__cvta_generic_to_shared(shared.codes)) +
                           token * CODE_STRIDE + part * 16;
    for (; share.row < share.row_end; share.row += share.group_rows) {
        Sum sums[2][4] = {};
        for (int chunk = share.chunk_start; chunk < share.chunk_end; ++chunk) {
            reader.copy(inputs, product);
            if (waiting) {
                await_copies<1>();
                waiting = false;
            } else {
                await_copies<SLOTS - 1>();
            }
            uint4 weights[4], given = make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < 4; ++i) weights[i] = read_shared(slot + i * PART + lane * 16);
            if (token < TOKENS)
                given = read_shared(inputs ? slot + WEIGHTS + lane * 16 : codes + chunk * CHUNK);
            const Inputs prepared_inputs = prepared(given);
            multiply(sums[0], weights[0], weights[1], prepared_inputs);
            multiply(sums[1], weights[2], weights[3], prepared_inputs);
            slot = next_slot(slot, reader.ring);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = token + (i & 2) * 4, column = part * 2 + (i & 1);
            if (column < TOKENS)
                shared.sums[buffer][i / 4][warp][row * TOKENS + column] = sums[i / 4][i % 4];
        }

        // One thread per output finishes it; what that takes is read while the warps meet.
        const int place = threadIdx.x % (TILE * TOKENS), tile = threadIdx.x / (TILE * TOKENS);
        const int in = place % TOKENS;
        const int channel = share.row + tile * TILE + place / TOKENS;
        const bool mine = tile < (RESULT == GATED ? 1 : 2) && channel < share.row_end;
        float scale = 0.0f, bias = 0.0f, scale2 = 0.0f, bias2 = 0.0f, residual = 0.0f;
        if (mine) {
            scale = __ldg(linear.scale + channel);
            if (linear.bias) bias = to_float(__ldg(linear.bias + channel));
            if (RESULT == GATED) {
                const int up = channel + linear.channels / 2;
                scale2 = __ldg(linear.scale + up);
                if (linear.bias) bias2 = to_float(__ldg(linear.bias + up));
            }
            if (RESULT == RESIDUAL) residual = to_float(read_value(out + in * HIDDEN + channel));
        }
        __syncthreads();
        if (mine) {
            const float value =
                rounded(total(shared.sums[buffer][RESULT == GATED ? 0 : tile], place) * scale + bias);
            if (RESULT == RESIDUAL) {
                out[in * HIDDEN + channel] = to_value(residual + value);
            } else if (RESULT == PLAIN) {
                out[in * linear.channels + channel] = to_value(value);
            } else {
                const float up = rounded(total(shared.sums[buffer][1], place) * scale2 + bias2);
                const float gate = rounded(divided(value, 1.0f + __expf(-value)));
                params.inner[in * (linear.channels / 2) + channel] =
                    to_code(rounded(gate * up), params.gated, channel);
            }
        }
        buffer ^= 1;
    }
}

// Every block makes the codes of all tokens for itself: RMSNorm of what all blocks have added up.
__device__ __forceinline__ void normalize(const Params& params, Shared& shared, const Norm& norm) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint4 factors[VECTORS], values[TOKENS][VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int channel = (i * THREADS + threadIdx.x) * 8;
        if (channel < HIDDEN) factors[i] = __ldg((const uint4*)(norm.weight + channel));
    }
    await_all_blocks(params.barrier);
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int channel = (i * THREADS + threadIdx.x) * 8;
            values[token][i] = make_uint4(0, 0, 0, 0);
            if (channel < HIDDEN)
                values[token][i] = read_values(params.hidden + token * HIDDEN + channel);
        }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const Value* value = (const Value*)&values[token][i];
#pragma unroll
            for (int k = 0; k < 8; ++k) square += to_float(value[k]) * to_float(value[k]);
        }
#pragma unroll
        for (int step = 16; step; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
        if (lane == 0) shared.squares[token][warp] = square;
    }
    __syncthreads();
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) square += shared.squares[token][i];
        const float inverse = rsqrtf(square / HIDDEN + params.epsilon);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int channel = (i * THREADS + threadIdx.x) * 8;
            const Value* value = (const Value*)&values[token][i];
            const Value* factor = (const Value*)&factors[i];
            Code codes[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float normal = rounded(to_float(value[k]) * inverse);
                const float scaled = rounded(normal * to_float(factor[k]));
                codes[k] = 0;
                if (channel < HIDDEN) codes[k] = to_code(scaled, norm.encoding, channel + k);
            }
            if (channel < HIDDEN)
                *(uint2*)(shared.codes + token * CODE_STRIDE + channel) = *(const uint2*)codes;
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void fetch(const Code* weight, int row, int rows, int depth) {
#if __CUDA_ARCH__ >= 900
    const Code* at = weight + (long long)row * depth;
    for (unsigned left = rows * depth; left;) {
        const unsigned size = min(left, 16384u);
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(size) : "memory");
        at += size;
        left -= size;
    }
#endif
}

// Brings the first weights of the next launch into the L2 cache: attention, which comes between,
// leaves the memory idle half of the time.
__device__ __forceinline__ void fetch_ahead(const Params& params) {
    if (threadIdx.x != 0 || !params.ahead[0]) return;
    const Linear& output = params.products[OUTPUT];
    const Linear& gate_up = params.products[GATE_UP];
    const Share first(output, false), second(gate_up, true);
    fetch(params.ahead[0], first.row, first.row_end - first.row, output.depth);
    const int rows = min(second.row_end - second.row, params.ahead_groups * TILE);
    if (rows <= 0) return;
    fetch(params.ahead[1], second.row, rows, gate_up.depth);
    fetch(params.ahead[1], second.row + gate_up.channels / 2, rows, gate_up.depth);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_block(const __grid_constant__ Params params) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const unsigned ring =
        unsigned(__cvta_generic_to_shared(shared.rings)) + threadIdx.x / 32 * RING;
    Reader reader(params, ring);
#pragma unroll 1
    for (int step = 0; step < SLOTS - 1; ++step) reader.copy(nullptr, 0);
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    unsigned slot = ring;
    int buffer = 0;
    run_product<RESIDUAL>(params, shared, reader, slot, buffer, OUTPUT, params.mixed, params.hidden);
    normalize(params, shared, params.norms[0]);
    run_product<GATED>(params, shared, reader, slot, buffer, GATE_UP, nullptr, nullptr);
    await_all_blocks(params.barrier);
    run_product<RESIDUAL>(params, shared, reader, slot, buffer, DOWN, params.inner, params.hidden);
    if (params.count <= QKV) return;
    normalize(params, shared, params.norms[1]);
    fetch_ahead(params);
    run_product<PLAIN>(params, shared, reader, slot, buffer, QKV, nullptr, params.qkv);
}
