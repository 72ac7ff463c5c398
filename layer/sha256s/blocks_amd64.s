#include "textflag.h"

// SHA-256 with the instructions of Gulley et al., "Intel SHA Extensions" (Intel, 2013), for two and for three states at once.

#define msg  X0 // what SHA256RNDS2 takes: the words of two rounds, with their constants
#define a0   X1 // the first state: its words a, b, e, f
#define a1   X2 // and c, d, g, h
#define b0   X3 // the second one
#define b1   X4
#define c0   X5 // the third one
#define c1   X6
#define m0   X7 // the last 16 words of the message schedule
#define m1   X8
#define m2   X9
#define m3   X10
#define tmp  X11
#define swap X12

// LOAD takes the words of a state, a to d and e to h, to where the instructions have them. PSHUFD sees the last one first.
#define LOAD(state, s0, s1) \
	VMOVDQU (state), s0   \
	VMOVDQU 16(state), s1 \
	PSHUFD  $0xb1, s0, s0 \
	PSHUFD  $0x1b, s1, s1 \
	VMOVDQA s0, tmp       \
	PALIGNR $8, s1, s0    \
	PBLENDW $0xf0, tmp, s1

// STORE takes them back.
#define STORE(state, s0, s1) \
	PSHUFD  $0x1b, s0, s0 \
	PSHUFD  $0xb1, s1, s1 \
	VMOVDQA s0, tmp       \
	PBLENDW $0xf0, s1, s0 \
	PALIGNR $8, tmp, s1   \
	VMOVDQU s0, (state)   \
	VMOVDQU s1, 16(state)

// SAVE keeps a state as it is before a block, and ADD adds that to what it is behind it.
#define SAVE(at, s0, s1) \
	VMOVDQU s0, at(SP) \
	VMOVDQU s1, at+16(SP)

#define ADD(at, s0, s1) \
	VPADDD at(SP), s0, s0 \
	VPADDD at+16(SP), s1, s1

// WORDS takes four words from the block.
#define WORDS(at, m) \
	VMOVDQU at(SI), m \
	PSHUFB  swap, m

// TWO and THREE do four rounds of so many states.
#define TWO(k, m) \
	VPADDD      k(AX), m, msg   \
	SHA256RNDS2 msg, a0, a1     \
	SHA256RNDS2 msg, b0, b1     \
	PSHUFD      $0x0e, msg, msg \
	SHA256RNDS2 msg, a1, a0     \
	SHA256RNDS2 msg, b1, b0

#define THREE(k, m) \
	VPADDD      k(AX), m, msg   \
	SHA256RNDS2 msg, a0, a1     \
	SHA256RNDS2 msg, b0, b1     \
	SHA256RNDS2 msg, c0, c1     \
	PSHUFD      $0x0e, msg, msg \
	SHA256RNDS2 msg, a1, a0     \
	SHA256RNDS2 msg, b1, b0     \
	SHA256RNDS2 msg, c1, c0

// SCHEDULE makes next the four words behind those in at, which are behind those in before.
#define SCHEDULE(before, at, next) \
	VPALIGNR   $4, before, at, tmp \
	VPADDD     tmp, next, next     \
	SHA256MSG2 at, next

// BLOCK does the rounds of a block.
#define BLOCK(ROUNDS) \
	WORDS(0, m0)         \
	ROUNDS(0, m0)        \
	WORDS(16, m1)        \
	ROUNDS(16, m1)       \
	SHA256MSG1 m1, m0    \
	WORDS(32, m2)        \
	ROUNDS(32, m2)       \
	SHA256MSG1 m2, m1    \
	WORDS(48, m3)        \
	ROUNDS(48, m3)       \
	SCHEDULE(m2, m3, m0) \
	SHA256MSG1 m3, m2    \
	ROUNDS(64, m0)       \
	SCHEDULE(m3, m0, m1) \
	SHA256MSG1 m0, m3    \
	ROUNDS(80, m1)       \
	SCHEDULE(m0, m1, m2) \
	SHA256MSG1 m1, m0    \
	ROUNDS(96, m2)       \
	SCHEDULE(m1, m2, m3) \
	SHA256MSG1 m2, m1    \
	ROUNDS(112, m3)      \
	SCHEDULE(m2, m3, m0) \
	SHA256MSG1 m3, m2    \
	ROUNDS(128, m0)      \
	SCHEDULE(m3, m0, m1) \
	SHA256MSG1 m0, m3    \
	ROUNDS(144, m1)      \
	SCHEDULE(m0, m1, m2) \
	SHA256MSG1 m1, m0    \
	ROUNDS(160, m2)      \
	SCHEDULE(m1, m2, m3) \
	SHA256MSG1 m2, m1    \
	ROUNDS(176, m3)      \
	SCHEDULE(m2, m3, m0) \
	SHA256MSG1 m3, m2    \
	ROUNDS(192, m0)      \
	SCHEDULE(m3, m0, m1) \
	SHA256MSG1 m0, m3    \
	ROUNDS(208, m1)      \
	SCHEDULE(m0, m1, m2) \
	ROUNDS(224, m2)      \
	SCHEDULE(m1, m2, m3) \
	ROUNDS(240, m3)

// func blocks2(a, b *[8]uint32, p *byte, n int)
TEXT ·blocks2(SB), NOSPLIT, $64-32
	MOVQ    a+0(FP), DI
	MOVQ    b+8(FP), DX
	MOVQ    p+16(FP), SI
	MOVQ    n+24(FP), CX
	LEAQ    ·constants(SB), AX
	VMOVDQU ·bigEndian(SB), swap
	LOAD(DI, a0, a1)
	LOAD(DX, b0, b1)

block:
	SAVE(0, a0, a1)
	SAVE(32, b0, b1)
	BLOCK(TWO)
	ADD(0, a0, a1)
	ADD(32, b0, b1)
	ADDQ $64, SI
	DECQ CX
	JNZ  block

	STORE(DI, a0, a1)
	STORE(DX, b0, b1)
	RET

// func blocks3(a, b, c *[8]uint32, p *byte, n int)
TEXT ·blocks3(SB), NOSPLIT, $96-40
	MOVQ    a+0(FP), DI
	MOVQ    b+8(FP), DX
	MOVQ    c+16(FP), BX
	MOVQ    p+24(FP), SI
	MOVQ    n+32(FP), CX
	LEAQ    ·constants(SB), AX
	VMOVDQU ·bigEndian(SB), swap
	LOAD(DI, a0, a1)
	LOAD(DX, b0, b1)
	LOAD(BX, c0, c1)

block:
	SAVE(0, a0, a1)
	SAVE(32, b0, b1)
	SAVE(64, c0, c1)
	BLOCK(THREE)
	ADD(0, a0, a1)
	ADD(32, b0, b1)
	ADD(64, c0, c1)
	ADDQ $64, SI
	DECQ CX
	JNZ  block

	STORE(DI, a0, a1)
	STORE(DX, b0, b1)
	STORE(BX, c0, c1)
	RET

// bigEndian has PSHUFB turn the bytes of each word round.
DATA ·bigEndian+0(SB)/8, $0x0405060700010203
DATA ·bigEndian+8(SB)/8, $0x0c0d0e0f08090a0b
GLOBL ·bigEndian(SB), RODATA|NOPTR, $16

// The constants of the rounds: FIPS 180-4, 4.2.2.
DATA ·constants+0(SB)/8, $0x71374491428a2f98
DATA ·constants+8(SB)/8, $0xe9b5dba5b5c0fbcf
DATA ·constants+16(SB)/8, $0x59f111f13956c25b
DATA ·constants+24(SB)/8, $0xab1c5ed5923f82a4
DATA ·constants+32(SB)/8, $0x12835b01d807aa98
DATA ·constants+40(SB)/8, $0x550c7dc3243185be
DATA ·constants+48(SB)/8, $0x80deb1fe72be5d74
DATA ·constants+56(SB)/8, $0xc19bf1749bdc06a7
DATA ·constants+64(SB)/8, $0xefbe4786e49b69c1
DATA ·constants+72(SB)/8, $0x240ca1cc0fc19dc6
DATA ·constants+80(SB)/8, $0x4a7484aa2de92c6f
DATA ·constants+88(SB)/8, $0x76f988da5cb0a9dc
DATA ·constants+96(SB)/8, $0xa831c66d983e5152
DATA ·constants+104(SB)/8, $0xbf597fc7b00327c8
DATA ·constants+112(SB)/8, $0xd5a79147c6e00bf3
DATA ·constants+120(SB)/8, $0x1429296706ca6351
DATA ·constants+128(SB)/8, $0x2e1b213827b70a85
DATA ·constants+136(SB)/8, $0x53380d134d2c6dfc
DATA ·constants+144(SB)/8, $0x766a0abb650a7354
DATA ·constants+152(SB)/8, $0x92722c8581c2c92e
DATA ·constants+160(SB)/8, $0xa81a664ba2bfe8a1
DATA ·constants+168(SB)/8, $0xc76c51a3c24b8b70
DATA ·constants+176(SB)/8, $0xd6990624d192e819
DATA ·constants+184(SB)/8, $0x106aa070f40e3585
DATA ·constants+192(SB)/8, $0x1e376c0819a4c116
DATA ·constants+200(SB)/8, $0x34b0bcb52748774c
DATA ·constants+208(SB)/8, $0x4ed8aa4a391c0cb3
DATA ·constants+216(SB)/8, $0x682e6ff35b9cca4f
DATA ·constants+224(SB)/8, $0x78a5636f748f82ee
DATA ·constants+232(SB)/8, $0x8cc7020884c87814
DATA ·constants+240(SB)/8, $0xa4506ceb90befffa
DATA ·constants+248(SB)/8, $0xc67178f2bef9a3f7
GLOBL ·constants(SB), RODATA|NOPTR, $256
