#include "textflag.h"

// SHA-256 (FIPS 180-4, 6.2.2) of up to four states over the same blocks, each state in a lane, by AVX-512's rotations and
// three-operand logic on 128 bits. The message schedule is the states' own business in none of it: it's made once, of four blocks at a time, each block in
// a lane.

#define t0   X8
#define t1   X9
#define t2   X10
#define t3   X11
#define t4   X12
#define t5   X13
#define swap X14

// XOR makes x = x ^ y ^ z, CHOOSE x = x ? y : z, and MAJORITY what at least two of x, y and z are, bit by bit.
#define XOR(x, y, z)      VPTERNLOGD $0x96, z, y, x
#define CHOOSE(x, y, z)   VPTERNLOGD $0xca, z, y, x
#define MAJORITY(x, y, z) VPTERNLOGD $0xe8, z, y, x

// KEEP has the words of round t, with their constant, where the rounds find them.
#define KEEP(t, w) \
	VPADDD.BCST 4*t(AX), w, t0 \
	VMOVDQU     t0, 16*t(SP)

// WORDS takes the words of four rounds, from t on, from the four blocks: it's a matrix to be transposed.
#define WORDS(t, w0, w1, w2, w3) \
	VMOVDQU     4*t+0(SI), t0   \
	VMOVDQU     4*t+64(SI), t1  \
	VMOVDQU     4*t+128(SI), t2 \
	VMOVDQU     4*t+192(SI), t3 \
	VPSHUFB     swap, t0, t0    \
	VPSHUFB     swap, t1, t1    \
	VPSHUFB     swap, t2, t2    \
	VPSHUFB     swap, t3, t3    \
	VPUNPCKLDQ  t1, t0, t4      \
	VPUNPCKHDQ  t1, t0, t5      \
	VPUNPCKLDQ  t3, t2, t0      \
	VPUNPCKHDQ  t3, t2, t1      \
	VPUNPCKLQDQ t0, t4, w0      \
	VPUNPCKHQDQ t0, t4, w1      \
	VPUNPCKLQDQ t1, t5, w2      \
	VPUNPCKHQDQ t1, t5, w3      \
	KEEP(t, w0)                 \
	KEEP((t+1), w1)             \
	KEEP((t+2), w2)             \
	KEEP((t+3), w3)

// SCHEDULE makes the words of round t of those of 16, 15, 7 and 2 rounds before, in place of the first.
#define SCHEDULE(t, w16, w15, w7, w2) \
	VPRORD $7, w15, t1    \
	VPRORD $18, w15, t2   \
	VPSRLD $3, w15, t3    \
	XOR(t1, t2, t3)       \
	VPRORD $17, w2, t2    \
	VPRORD $19, w2, t3    \
	VPSRLD $10, w2, t4    \
	XOR(t2, t3, t4)       \
	VPADDD w7, w16, w16   \
	VPADDD t1, w16, w16   \
	VPADDD t2, w16, w16   \
	KEEP(t, w16)

// SCHEDULES does so for 16 rounds.
#define SCHEDULES(t) \
	SCHEDULE((t+0), X16, X17, X25, X30) \
	SCHEDULE((t+1), X17, X18, X26, X31) \
	SCHEDULE((t+2), X18, X19, X27, X16) \
	SCHEDULE((t+3), X19, X20, X28, X17) \
	SCHEDULE((t+4), X20, X21, X29, X18) \
	SCHEDULE((t+5), X21, X22, X30, X19) \
	SCHEDULE((t+6), X22, X23, X31, X20) \
	SCHEDULE((t+7), X23, X24, X16, X21) \
	SCHEDULE((t+8), X24, X25, X17, X22) \
	SCHEDULE((t+9), X25, X26, X18, X23) \
	SCHEDULE((t+10), X26, X27, X19, X24) \
	SCHEDULE((t+11), X27, X28, X20, X25) \
	SCHEDULE((t+12), X28, X29, X21, X26) \
	SCHEDULE((t+13), X29, X30, X22, X27) \
	SCHEDULE((t+14), X30, X31, X23, X28) \
	SCHEDULE((t+15), X31, X16, X24, X29)

// ROUND is one round of all states. What was h is a then, and the others are one further on; BX points to the block's word of the round at 0.
#define ROUND(at, a, b, c, d, e, f, g, h) \
	VPADDD.BCST at(BX), h, h \
	VPRORD      $6, e, t0    \
	VPRORD      $11, e, t1   \
	VPRORD      $25, e, t2   \
	XOR(t0, t1, t2)          \
	VMOVDQA     e, t3        \
	CHOOSE(t3, f, g)         \
	VPADDD      t3, h, h     \
	VPADDD      t0, h, h     \
	VPADDD      h, d, d      \
	VPRORD      $2, a, t0    \
	VPRORD      $13, a, t1   \
	VPRORD      $22, a, t2   \
	XOR(t0, t1, t2)          \
	VMOVDQA     a, t3        \
	MAJORITY(t3, b, c)       \
	VPADDD      t0, h, h     \
	VPADDD      t3, h, h

// func lanes(states *[8][4]uint32, p *byte, n int)
TEXT ·lanes(SB), 0, $1024-24
	MOVQ    states+0(FP), DI
	MOVQ    p+8(FP), SI
	MOVQ    n+16(FP), CX
	LEAQ    ·constants(SB), AX
	VMOVDQU ·bigEndian(SB), swap
	VMOVDQU 0(DI), X0
	VMOVDQU 16(DI), X1
	VMOVDQU 32(DI), X2
	VMOVDQU 48(DI), X3
	VMOVDQU 64(DI), X4
	VMOVDQU 80(DI), X5
	VMOVDQU 96(DI), X6
	VMOVDQU 112(DI), X7

blocks:
	WORDS(0, X16, X17, X18, X19)
	WORDS(4, X20, X21, X22, X23)
	WORDS(8, X24, X25, X26, X27)
	WORDS(12, X28, X29, X30, X31)
	SCHEDULES(16)
	SCHEDULES(32)
	SCHEDULES(48)

	MOVQ SP, BX
	MOVQ $4, DX

block:
	VMOVDQA32 X0, X16
	VMOVDQA32 X1, X17
	VMOVDQA32 X2, X18
	VMOVDQA32 X3, X19
	VMOVDQA32 X4, X20
	VMOVDQA32 X5, X21
	VMOVDQA32 X6, X22
	VMOVDQA32 X7, X23
	MOVQ      $8, R8

rounds:
	ROUND(0, X0, X1, X2, X3, X4, X5, X6, X7)
	ROUND(16, X7, X0, X1, X2, X3, X4, X5, X6)
	ROUND(32, X6, X7, X0, X1, X2, X3, X4, X5)
	ROUND(48, X5, X6, X7, X0, X1, X2, X3, X4)
	ROUND(64, X4, X5, X6, X7, X0, X1, X2, X3)
	ROUND(80, X3, X4, X5, X6, X7, X0, X1, X2)
	ROUND(96, X2, X3, X4, X5, X6, X7, X0, X1)
	ROUND(112, X1, X2, X3, X4, X5, X6, X7, X0)
	ADDQ $128, BX
	DECQ R8
	JNZ  rounds

	VPADDD X16, X0, X0
	VPADDD X17, X1, X1
	VPADDD X18, X2, X2
	VPADDD X19, X3, X3
	VPADDD X20, X4, X4
	VPADDD X21, X5, X5
	VPADDD X22, X6, X6
	VPADDD X23, X7, X7
	SUBQ   $1020, BX
	DECQ   DX
	JNZ    block

	ADDQ $256, SI
	DECQ CX
	JNZ  blocks

	VMOVDQU X0, 0(DI)
	VMOVDQU X1, 16(DI)
	VMOVDQU X2, 32(DI)
	VMOVDQU X3, 48(DI)
	VMOVDQU X4, 64(DI)
	VMOVDQU X5, 80(DI)
	VMOVDQU X6, 96(DI)
	VMOVDQU X7, 112(DI)
	RET
