// AVX-VNNI and AMX int8 on a processor with AVX2 but without these: preloaded into the driver, it computes each
// instruction that traps. An instruction that it does not know, or that the tiles are not configured for, ends the process
// as without it. Reports at exit how many there were.
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

static __thread uint8_t tile[8][16][64];
static __thread uint8_t config[64];  // as LDTILECFG reads it: the palette, bytes per row at 16, rows at 48
static unsigned ymm_offset;          // of the upper halves of the registers in the saved state
static unsigned long count;

enum { kNone, k66, kF3, kF2 };  // the prefix that VEX.pp stands for

typedef struct {
  int w, l, pp, opcode, reg, vvvv, rm, memory, indexed;
  uint64_t address, index;  // of the operand in memory, but for the index; the scaled index
  const uint8_t* end;
} Instruction;

static const int kRegister[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static int32_t read32(const void* p) {
  int32_t value;
  memcpy(&value, p, 4);
  return value;
}

// Three-byte VEX in the map 0F38; Intel's manual, volume 2, 2.1.5 and 2.3.
static int decode(const uint8_t* p, const greg_t* general, Instruction* it) {
  if (p[0] != 0xc4 || (p[1] & 0x1f) != 2) return 0;
  const int r = !(p[1] & 0x80) << 3, x = !(p[1] & 0x40) << 3, b = !(p[1] & 0x20) << 3;
  const int mod = p[4] >> 6, rm = p[4] & 7;
  *it = (Instruction){.w = p[2] >> 7, .vvvv = ~p[2] >> 3 & 15, .l = p[2] >> 2 & 1, .pp = p[2] & 3, .opcode = p[3]};
  it->reg = (p[4] >> 3 & 7) | r;
  it->rm = rm | b;
  it->memory = mod != 3;
  p += 5;
  if (it->memory) {
    int from_end = 0;
    if (rm == 4) {  // a SIB byte: base + index << scale
      const int sib = *p++, index = (sib >> 3 & 7) | x, base = sib & 7;
      it->indexed = 1;
      if (index != 4) it->index = (uint64_t)general[kRegister[index]] << (sib >> 6);
      if (base == 5 && mod == 0) {
        it->address = (uint64_t)(int64_t)read32(p);
        p += 4;
      } else {
        it->address = (uint64_t)general[kRegister[base | b]];
      }
    } else if (rm == 5 && mod == 0) {  // relative to the end of the instruction
      it->address = (uint64_t)(int64_t)read32(p);
      from_end = 1;
      p += 4;
    } else {
      it->address = (uint64_t)general[kRegister[rm | b]];
    }
    if (mod == 1) it->address += (uint64_t)(int64_t)(int8_t)*p++;
    if (mod == 2) {
      it->address += (uint64_t)(int64_t)read32(p);
      p += 4;
    }
    if (from_end) it->address += (uint64_t)p;
  }
  it->end = p;
  return 1;
}

// ---- AMX -----------------------------------------------------------------------------------------------------------

static int rows_of(int t) { return config[48 + t]; }
static int bytes_of(int t) { return config[16 + 2 * t] | config[17 + 2 * t] << 8; }
static int configured(int t) {
  return t < 8 && config[0] == 1 && rows_of(t) >= 1 && rows_of(t) <= 16 && bytes_of(t) >= 1 && bytes_of(t) <= 64;
}

static int configure(const Instruction* it) {
  void* memory = (void*)(it->address + it->index);
  if (it->memory && it->pp == kNone && it->reg == 0) {  // LDTILECFG
    memcpy(config, memory, 64);
    memset(tile, 0, sizeof(tile));
    return config[0] <= 1;
  }
  if (it->memory && it->pp == k66 && it->reg == 0) {  // STTILECFG
    memcpy(memory, config, 64);
    return 1;
  }
  if (!it->memory && it->pp == kNone && it->reg == 0 && it->rm == 0) {  // TILERELEASE
    memset(config, 0, sizeof(config));
    memset(tile, 0, sizeof(tile));
    return 1;
  }
  if (it->memory || it->pp != kF2 || it->rm != 0 || !configured(it->reg)) return 0;
  memset(tile[it->reg], 0, sizeof(tile[0]));  // TILEZERO
  return 1;
}

static int move(const Instruction* it) {
  const int t = it->reg;
  if (!it->memory || !it->indexed || it->pp == kNone || !configured(t)) return 0;
  if (it->pp != kF3) memset(tile[t], 0, sizeof(tile[0]));
  for (int r = 0; r < rows_of(t); r++) {
    void* memory = (void*)(it->address + (uint64_t)r * it->index);
    if (it->pp == kF3)  // TILESTORED
      memcpy(memory, tile[t][r], (size_t)bytes_of(t));
    else  // TILELOADD, TILELOADDT1
      memcpy(tile[t][r], memory, (size_t)bytes_of(t));
  }
  return 1;
}

// TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD: c += a b over quads of bytes.
static int multiply_tiles(const Instruction* it) {
  const int c = it->reg, a = it->rm, b = it->vvvv;
  if (it->memory || a == b || a == c || b == c || !configured(a) || !configured(b) || !configured(c)) return 0;
  if (rows_of(c) != rows_of(a) || bytes_of(c) != bytes_of(b) || bytes_of(a) != 4 * rows_of(b)) return 0;
  const int a_signed = it->pp == kF2 || it->pp == kF3, b_signed = it->pp == kF2 || it->pp == k66;
  for (int m = 0; m < rows_of(c); m++)
    for (int n = 0; n < bytes_of(c) / 4; n++) {
      uint32_t sum = (uint32_t)read32(&tile[c][m][4 * n]);
      for (int k = 0; k < rows_of(b); k++)
        for (int i = 0; i < 4; i++) {
          const uint8_t x = tile[a][m][4 * k + i], y = tile[b][k][4 * n + i];
          sum += (uint32_t)((a_signed ? (int8_t)x : x) * (b_signed ? (int8_t)y : y));
        }
      memcpy(&tile[c][m][4 * n], &sum, 4);
    }
  return 1;
}

// ---- AVX-VNNI ------------------------------------------------------------------------------------------------------

static void get(const uint8_t* state, int index, uint8_t to[32]) {
  memcpy(to, state + 160 + 16 * index, 16);
  memcpy(to + 16, state + ymm_offset + 16 * index, 16);
}

static void put(uint8_t* state, int index, const uint8_t from[32]) {
  memcpy(state + 160 + 16 * index, from, 16);
  memcpy(state + ymm_offset + 16 * index, from + 16, 16);
  state[512] |= 6;  // both halves hold values
}

// VPDPBUSD: c + four products of unsigned bytes of a and signed bytes of b; VPDPWSSD: two of signed halves; S: saturated.
static int multiply_lanes(const Instruction* it, uint8_t* state) {
  if (it->pp != k66) return 0;
  const int bytes = it->l ? 32 : 16;
  uint8_t a[32], b[32], c[32];
  get(state, it->reg, c);
  get(state, it->vvvv, a);
  if (it->memory)
    memcpy(b, (void*)(it->address + it->index), (size_t)bytes);
  else
    get(state, it->rm, b);
  for (int at = 0; at < bytes; at += 4) {
    int64_t sum = read32(c + at);
    if (it->opcode < 0x52) {
      for (int i = 0; i < 4; i++) sum += a[at + i] * (int8_t)b[at + i];
    } else {
      int16_t x[2], y[2];
      memcpy(x, a + at, 4);
      memcpy(y, b + at, 4);
      sum += (int64_t)x[0] * y[0] + (int64_t)x[1] * y[1];
    }
    if (it->opcode & 1) sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
    const uint32_t low = (uint32_t)sum;
    memcpy(c + at, &low, 4);
  }
  memset(c + bytes, 0, (size_t)(32 - bytes));
  put(state, it->reg, c);
  return 1;
}

// ---- the trap ------------------------------------------------------------------------------------------------------

static void on_trap(int number, siginfo_t* info, void* context) {
  (void)info;
  mcontext_t* machine = &((ucontext_t*)context)->uc_mcontext;
  Instruction it;
  int known = decode((const uint8_t*)machine->gregs[REG_RIP], machine->gregs, &it) && it.w == 0;
  if (known && it.opcode >= 0x50 && it.opcode <= 0x53)
    known = multiply_lanes(&it, (uint8_t*)machine->fpregs);
  else if (known)
    known = it.l == 0 && ((it.opcode == 0x49 && configure(&it)) || (it.opcode == 0x4b && move(&it)) ||
                          (it.opcode == 0x5e && multiply_tiles(&it)));
  if (!known) {
    signal(number, SIG_DFL);  // the instruction traps again
    return;
  }
  count++;
  machine->gregs[REG_RIP] = (greg_t)it.end;
}

__attribute__((constructor)) static void begin(void) {
  unsigned a, c, d;
  __cpuid_count(0xd, 2, a, ymm_offset, c, d);
  struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGILL, &action, NULL);
}

__attribute__((destructor)) static void end(void) { fprintf(stderr, "sigill: %lu instructions\n", count); }
