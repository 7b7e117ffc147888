// What lies between two attentions of a decode step, for 1 to 8 tokens, in one launch: the
// attention's output projection, the MLP, and the next layer's q/k/v projection. For Hopper.
//
// Reading the weights is all that takes time here, so they must flow without a pause. Every warp has
// a ring of its own in shared memory, which the copy engine (TMA) keeps filled, SLOTS steps ahead.
// Weights depend on nothing, so these copies run on through the barriers between the four products,
// while sums are added up and inputs are normalized.
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
constexpr int UNIT = 4;     // channels that are copied together, and by which they are shared out
constexpr int STEP = 256;   // inputs of one step
constexpr int CHUNK = 64;   // of those, 16 of each of the four threads that share a channel
constexpr int CHUNKS = STEP / CHUNK;
constexpr int SLOT = TILE * STEP;  // bytes
// Tokens' codes lie half of the 32 banks apart, so that two of them can be read at once.
constexpr int CODE_STRIDE = HIDDEN + (HIDDEN % 128 == 0 ? 64 : 0);
constexpr int VECTORS = (HIDDEN / 8 + THREADS - 1) / THREADS;

#if FP8
typedef float Sum;
#else
typedef int Sum;
#endif

struct __align__(64) TensorMap {
    unsigned char opaque[128];
};

struct Linear {
    const float* scale;  // [channels]
    const Value* bias;   // [channels] or null
    int channels;
    int depth;           // a multiple of 16
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
    TensorMap weights[4];  // of the products: [channels, depth], in boxes of UNIT x STEP
    Linear products[4];    // output, gate above up, down, q/k/v of the next layer
    Norm norms[2];         // before gate/up, before q/k/v
    Encoding gated;        // of what down reads
    const Code* mixed;     // [TOKENS, output.depth]: what the attention made
    Value* hidden;         // [TOKENS, HIDDEN], updated in place
    Code* inner;           // [TOKENS, down.depth]
    Value* qkv;            // [TOKENS, q/k/v channels]
    unsigned* barrier;     // 0 at first; every launch leaves it at 0 or 2^31
    float epsilon;
    int count;             // products: 3 after the last layer
};

enum Product { OUTPUT, GATE_UP, DOWN, QKV };

struct __align__(128) Shared {
    unsigned char rings[WARPS][SLOTS][SLOT];
    unsigned char codes[TOKENS * CODE_STRIDE];
    // One set of sums is added up while the warps write the other.
    Sum sums[2][2][WARPS][TILE * TOKENS];
    unsigned long long arrived[WARPS][SLOTS];  // barriers that the copies of a slot report to
    float squares[TOKENS][WARPS];
};

static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch asks for too little shared memory");

// ---- Values and codes, rounded as the other kernels do (formats.py) ----

struct Two {
    float low, high;
};

__device__ __forceinline__ Two to_floats(unsigned bits) {
    Two values;
#if BF16
    values.low = __uint_as_float(bits << 16);
    values.high = __uint_as_float(bits & 0xffff0000u);
#else
    asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;\n}"
        : "=f"(values.low), "=f"(values.high)
        : "r"(bits));
#endif
    return values;
}

__device__ __forceinline__ unsigned to_values(Two values) {
    unsigned bits;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(values.high), "f"(values.low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(values.high), "f"(values.low));
#endif
    return bits;
}

__device__ __forceinline__ Two rounded(Two values) { return to_floats(to_values(values)); }

__device__ __forceinline__ Two times(Two a, Two b) { return {a.low * b.low, a.high * b.high}; }

__device__ __forceinline__ float to_float(unsigned bits) { return to_floats(bits).low; }

__device__ __forceinline__ Value to_value(float value) { return Value(to_values({value, 0.0f})); }

__device__ __forceinline__ float rounded(float value) { return to_float(to_value(value)); }

__device__ __forceinline__ float reciprocal(float value) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// The codes of two values that were divided by their scale.
__device__ __forceinline__ unsigned to_codes(Two values) {
#if FP8
    Value codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(codes)
        : "f"(values.high), "f"(values.low));
    return codes;
#else
    const int low = __float2int_rn(fminf(fmaxf(values.low, -128.0f), 127.0f));
    const int high = __float2int_rn(fminf(fmaxf(values.high, -128.0f), 127.0f));
    return (low & 0xff) | (high & 0xff) << 8;
#endif
}

// ---- Memory ----

__device__ __forceinline__ unsigned shared_address(const void* at) {
    return unsigned(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void prepare_barrier(unsigned barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void show_barriers_to_copies() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void expect_copies(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_box(unsigned to, const TensorMap* map, int column, int row,
                                         unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void await_copies(unsigned barrier, unsigned turn) {
    asm volatile(
        "{\n .reg .pred done;\nAGAIN:\n"
        " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @!done bra AGAIN;\n}" ::"r"(barrier),
        "r"(turn)
        : "memory");
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
__device__ __forceinline__ unsigned read_value(const Value* at) {
    unsigned value;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

__device__ __forceinline__ uint4 read_16_bytes(const void* at) {
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

// One warp's part of one product: its block's channels, in groups of up to two tiles (of gate and
// up: a tile of each), and its inputs.
struct Share {
    int row, row_end, group_rows;
    int step_start, step_end;

    __device__ __forceinline__ Share(const Linear& linear, bool paired) {
        const int rows = paired ? linear.channels / 2 : linear.channels;
        const int units = (rows + UNIT - 1) / UNIT, steps = (linear.depth + STEP - 1) / STEP;
        row = UNIT * share_start(units, blockIdx.x, gridDim.x);
        row_end = min(rows, UNIT * share_start(units, blockIdx.x + 1, gridDim.x));
        group_rows = paired ? TILE : 2 * TILE;
        step_start = share_start(steps, threadIdx.x / 32, WARPS);
        step_end = share_start(steps, threadIdx.x / 32 + 1, WARPS);
    }
};

// A place in a warp's ring.
struct Place {
    unsigned slot, barrier;
    int index;
    unsigned turn;

    __device__ __forceinline__ Place(Shared& shared)
        : slot(shared_address(shared.rings[threadIdx.x / 32])),
          barrier(shared_address(shared.arrived[threadIdx.x / 32])),
          index(0),
          turn(0) {}

    __device__ __forceinline__ void advance() {
        const bool wraps = ++index == SLOTS;
        slot += wraps ? -(SLOTS - 1) * SLOT : SLOT;
        barrier += wraps ? -(SLOTS - 1) * 8 : 8;
        turn ^= wraps;
        index = wraps ? 0 : index;
    }
};

// Has weights copied, in the order in which `run_product` will want them, through all products. One
// thread of a warp does.
struct Reader {
    const Params& params;
    Place place;
    int product;
    Share share;
    int step, tile;

    __device__ __forceinline__ Reader(const Params& params, Shared& shared)
        : params(params), place(shared), product(OUTPUT), share(params.products[0], false) {
        skip_empty();
    }

    // To the next product that has work for this warp, if this one has none left.
    __device__ __forceinline__ void skip_empty() {
        while (share.row >= share.row_end || share.step_start >= share.step_end) {
            if (++product >= params.count) return;
            share = Share(params.products[product], product == GATE_UP);
        }
        step = share.step_start;
        tile = 0;
    }

    __device__ __forceinline__ void copy() {
        if (product >= params.count) return;
        const bool paired = product == GATE_UP;
        const int left = share.row_end - share.row;
        const int rows = min(TILE, paired ? left : left - tile * TILE);
        const int row = share.row + tile * (paired ? params.products[product].channels / 2 : TILE);
        const int units = (rows + UNIT - 1) / UNIT;
        expect_copies(place.barrier, units * UNIT * STEP);
#pragma unroll 1
        for (int i = 0; i < units; ++i)
            copy_box(place.slot + i * UNIT * STEP, params.weights + product, step * STEP,
                     row + i * UNIT, place.barrier);
        place.advance();
        if (++tile < (paired || left > TILE ? 2 : 1)) return;
        tile = 0;
        if (++step < share.step_end) return;
        step = share.step_start;
        share.row += share.group_rows;
        skip_empty();
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
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
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
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
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

struct Codes {
    uint4 parts[CHUNKS];
};

// What a thread needs to finish the output that it has of a group of channels. It is asked for long
// before the sum is there, as it arrives behind the weights that are on their way; so nothing is
// done with it, which would wait, before `store`.
struct Finish {
    int token, channel, tile, in_tile;
    bool mine;
    float scale, up_scale, smoothing;
    unsigned bias, up_bias, residual;

    __device__ __forceinline__ Finish(const Params& params, int product, const Share& share) {
        const Linear& linear = params.products[product];
        const bool gated = product == GATE_UP;
        in_tile = threadIdx.x % (TILE * TOKENS);
        tile = threadIdx.x / (TILE * TOKENS);
        token = in_tile % TOKENS;
        channel = share.row + tile * TILE + in_tile / TOKENS;
        mine = tile < (gated ? 1 : 2) && channel < share.row_end;
        scale = up_scale = 0.0f;
        smoothing = 1.0f;
        bias = up_bias = residual = 0;
        if (!mine) return;
        scale = __ldg(linear.scale + channel);
        if (linear.bias) bias = read_value(linear.bias + channel);
        if (gated) {
            const int up = channel + linear.channels / 2;
            up_scale = __ldg(linear.scale + up);
            if (linear.bias) up_bias = read_value(linear.bias + up);
            if (params.gated.smoothing) smoothing = __ldg(params.gated.smoothing + channel);
        }
    }

    __device__ __forceinline__ void store(const Params& params, int product,
                                          const Sum (&sums)[2][WARPS][TILE * TOKENS]) {
        if (!mine) return;
        const int channels = params.products[product].channels;
        const bool gated = product == GATE_UP;
        const float value =
            rounded(total(sums[gated ? 0 : tile], in_tile) * scale + to_float(bias));
        if (gated) {
            const float up = rounded(total(sums[1], in_tile) * up_scale + to_float(up_bias));
            const float gate = rounded(value * reciprocal(1.0f + __expf(-value)));
            const float inner = rounded(gate * up) * smoothing * reciprocal(params.gated.scale);
            params.inner[token * (channels / 2) + channel] = Code(to_codes({inner, 0.0f}));
        } else if (product == QKV) {
            params.qkv[token * channels + channel] = to_value(value);
        } else {
            params.hidden[token * HIDDEN + channel] = to_value(to_float(residual) + value);
        }
    }
};

// One product for this block's channels. The tokens' codes are in shared memory if they were
// normalized, else in global memory.
__device__ __forceinline__ void run_product(const Params& params, Shared& shared, Reader& reader,
                                            Place& place, int& buffer, int product,
                                            Finish finish) {
    const Linear& linear = params.products[product];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int token = lane / 4, part = lane % 4;
    const bool gated = product == GATE_UP, adds = product == OUTPUT || product == DOWN;
    const Code* inputs = (product == OUTPUT ? params.mixed : params.inner) +
                         (long long)token * linear.depth;
    const unsigned codes = shared_address(shared.codes) + token * CODE_STRIDE;
    Share share(linear, gated);
    // The codes of this thread's token in one step, read one step ahead.
    const auto given = [&](int step) {
        Codes codes_of_step;
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int at = step * STEP + i * CHUNK + part * 16;
            codes_of_step.parts[i] = make_uint4(0, 0, 0, 0);
            if (token < TOKENS && at < linear.depth)
                codes_of_step.parts[i] =
                    adds ? read_16_bytes(inputs + at) : read_shared(codes + at);
        }
        return codes_of_step;
    };
#pragma unroll 1
    while (share.row < share.row_end) {
        if (adds && finish.mine)
            finish.residual =
                read_value(params.hidden + finish.token * HIDDEN + finish.channel);
        const bool two = gated || share.row_end - share.row > TILE;
        Sum sums[2][4] = {};
        Codes next = given(share.step_start);
#pragma unroll 1
        for (int step = share.step_start; step < share.step_end; ++step) {
            const Codes now = next;
            if (step + 1 < share.step_end) next = given(step + 1);
#pragma unroll 1
            for (int tile = 0; tile <= int(two); ++tile) {
                await_copies(place.barrier, place.turn);
                const unsigned from = place.slot + token * STEP + part * 16;
                uint4 upper[CHUNKS], lower[CHUNKS];
#pragma unroll
                for (int i = 0; i < CHUNKS; ++i) {
                    upper[i] = read_shared(from + i * CHUNK);
                    lower[i] = read_shared(from + i * CHUNK + 8 * STEP);
                }
                // Two sums at a time: a product waits long for the one before it.
                Sum other[4] = {};
#pragma unroll
                for (int i = 0; i < CHUNKS; i += 2) {
                    multiply(sums[0], upper[i], lower[i], prepared(now.parts[i]));
                    multiply(other, upper[i + 1], lower[i + 1], prepared(now.parts[i + 1]));
                }
                // With two tiles, each has its turn in front.
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const Sum sum = sums[0][i] + other[i];
                    sums[0][i] = two ? sums[1][i] : sum;
                    sums[1][i] = sum;
                }
                // All have read what the copy engine may now write over: a product needs it all.
                place.advance();
                __syncwarp();
                if (lane == 0) reader.copy();
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = token + (i & 2) * 4, column = part * 2 + (i & 1);
            if (column < TOKENS)
                shared.sums[buffer][i / 4][warp][row * TOKENS + column] = sums[i / 4][i % 4];
        }
        __syncthreads();
        finish.store(params, product, shared.sums[buffer]);
        buffer ^= 1;
        share.row += share.group_rows;
        finish = Finish(params, product, share);
    }
}

// Every block makes the codes of all tokens for itself: RMSNorm of what all blocks have added up.
__device__ __forceinline__ void normalize(const Params& params, Shared& shared, const Norm& norm) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint4 factors[VECTORS], values[TOKENS][VECTORS];
    float smoothing[VECTORS][8];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int channel = (i * THREADS + threadIdx.x) * 8;
        factors[i] = make_uint4(0, 0, 0, 0);
        if (channel < HIDDEN) factors[i] = __ldg((const uint4*)(norm.weight + channel));
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            smoothing[i][k] = 1.0f;
            if (norm.encoding.smoothing && channel < HIDDEN)
                smoothing[i][k] = __ldg(norm.encoding.smoothing + channel + k);
        }
    }
    await_all_blocks(params.barrier);
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int channel = (i * THREADS + threadIdx.x) * 8;
            values[token][i] = make_uint4(0, 0, 0, 0);
            if (channel < HIDDEN)
                values[token][i] = read_16_bytes(params.hidden + token * HIDDEN + channel);
        }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const unsigned* pairs = (const unsigned*)&values[token][i];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Two value = to_floats(pairs[k]);
                square += value.low * value.low + value.high * value.high;
            }
        }
#pragma unroll
        for (int step = 16; step; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
        if (lane == 0) shared.squares[token][warp] = square;
    }
    __syncthreads();
    const float unit = reciprocal(norm.encoding.scale);
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) square += shared.squares[token][i];
        const float inverse = rsqrtf(square / HIDDEN + params.epsilon);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int channel = (i * THREADS + threadIdx.x) * 8;
            const unsigned* pairs = (const unsigned*)&values[token][i];
            const unsigned* factor = (const unsigned*)&factors[i];
            unsigned codes[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Two normal = rounded(times(to_floats(pairs[k]), {inverse, inverse}));
                const Two scaled = rounded(times(normal, to_floats(factor[k])));
                const Two smooth =
                    times(scaled, {smoothing[i][2 * k], smoothing[i][2 * k + 1]});
                codes[k] = to_codes(times(smooth, {unit, unit}));
            }
            if (channel < HIDDEN)
                *(uint2*)(shared.codes + token * CODE_STRIDE + channel) =
                    make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
        }
    }
    __syncthreads();
}

// Brings the scales of this block's channels near, before the weights that they would wait behind.
__device__ __forceinline__ void fetch_scales(const Params& params) {
    constexpr int LINE = 32;  // scales
    for (int product = GATE_UP; product < params.count; ++product) {
        const Linear& linear = params.products[product];
        const Share share(linear, product == GATE_UP);
        const int row = share.row + threadIdx.x * LINE;
        if (share.row >= share.row_end || row >= share.row_end + LINE) continue;
        const float* scale = linear.scale + min(row, share.row_end - 1);
        asm volatile("prefetch.global.L2 [%0];" ::"l"(scale));
        if (product == GATE_UP)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(scale + linear.channels / 2));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_block(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Finish finish(params, OUTPUT, Share(params.products[OUTPUT], false));
    fetch_scales(params);
    Reader reader(params, shared);
    Place place(shared);
    if (threadIdx.x % 32 == 0) {
        for (int i = 0; i < SLOTS; ++i) prepare_barrier(place.barrier + 8 * i);
        show_barriers_to_copies();
#pragma unroll 1
        for (int i = 0; i < SLOTS; ++i) reader.copy();
    }
    __syncwarp();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int buffer = 0;
#pragma unroll 1
    for (int product = OUTPUT; product < params.count; ++product) {
        if (product != OUTPUT)
            finish = Finish(params, product, Share(params.products[product], product == GATE_UP));
        if (product == DOWN) await_all_blocks(params.barrier);
        if (product == GATE_UP || product == QKV)
            normalize(params, shared, params.norms[product == QKV]);
        run_product(params, shared, reader, place, buffer, product, finish);
    }
}
