/* SPDX-License-Identifier: Apache-2.0 */
/* latte_c.h as a C11 program sees it: every operator called, on problems solved by hand. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "latte/latte_c.h"

static int failures = 0;

static void check(bool holds, int line, const char* text) {
  if (holds) return;
  ++failures;
  fprintf(stderr, "test_c_api.c:%d: %s does not hold; last error: %s\n", line, text,
          latte_last_error());
}
#define CHECK(condition) check((condition), __LINE__, #condition)
#define NEAR(got, expected) CHECK(fabs((double)(got) - (expected)) < 1e-6)

/* float32 tensors of the shapes that the operators take. */
static latte_tensor vector(void* data, int64_t n) {
  return latte_dense(data, LATTE_FLOAT32, 1, (int64_t[]){n});
}
static latte_tensor matrix(void* data, int64_t rows, int64_t columns) {
  return latte_dense(data, LATTE_FLOAT32, 2, (int64_t[]){rows, columns});
}
static latte_tensor rank3(void* data, int64_t a, int64_t b, int64_t c) {
  return latte_dense(data, LATTE_FLOAT32, 3, (int64_t[]){a, b, c});
}
static latte_tensor rank4(void* data, int64_t c, int64_t d) {
  return latte_dense(data, LATTE_FLOAT32, 4, (int64_t[]){1, 1, c, d});
}

/* RUN(X, args): asks for the workspace and calls operator X with it. */
#define RUN(X, args)                                                           \
  do {                                                                         \
    int64_t bytes = 0;                                                         \
    CHECK(latte_##X##_workspace(&(args), 1, &bytes) == LATTE_OK);              \
    void* const workspace = malloc(bytes > 0 ? (size_t)bytes : 1);             \
    CHECK(latte_##X(&(args), workspace, bytes, 1) == LATTE_OK);                \
    if (bytes > 0) {                                                           \
      CHECK(latte_##X(&(args), workspace, bytes - 1, 1) == LATTE_VALUE_ERROR); \
      CHECK(strstr(latte_last_error(), "workspace has") != NULL);              \
    }                                                                          \
    free(workspace);                                                           \
  } while (0)

/* START(X, args): declares the arguments with their defaults; another size is refused. */
#define START(X, args)                                                     \
  latte_##X##_args args;                                                   \
  CHECK(latte_##X##_init(&(args), sizeof(args) - 1) == LATTE_VALUE_ERROR); \
  CHECK(strstr(latte_last_error(), "[" #X "] args has ") != NULL);         \
  CHECK(latte_##X##_init(NULL, sizeof(args)) == LATTE_VALUE_ERROR);        \
  CHECK(latte_##X##_init(&(args), sizeof(args)) == LATTE_OK)

/* One latent and equal keys: y is the running mean of v. */
static float q[2] = {0.5f, -3.0f}, k[2] = {2.0f, 2.0f}, v[2] = {1.0f, 3.0f};

static void latent_attention(void) {
  float y[2], max, norm, mean;
  START(latent_attention_forward, args);
  CHECK(args.causal && args.scale == 1.0);
  args.q = rank4(q, 2, 1);
  args.k = rank4(k, 2, 1);
  args.v = rank4(v, 2, 1);
  args.y = rank4(y, 2, 1);
  args.final.max = rank3(&max, 1, 1, 1);
  args.final.norm = rank3(&norm, 1, 1, 1);
  args.final.mean = rank4(&mean, 1, 1);
  RUN(latent_attention_forward, args);
  NEAR(y[0], 1.0);
  NEAR(y[1], 2.0);
  NEAR(max, 2.0);
  NEAR(norm, 2.0);
  NEAR(mean, 2.0);

  /* The sum of y is v0 + (v0 + v1) / 2 whatever q is. */
  float dy[2] = {1.0f, 1.0f}, dq[2], dk[2], dv[2];
  START(latent_attention_backward, grad);
  grad.q = args.q;
  grad.k = args.k;
  grad.v = args.v;
  grad.dy = rank4(dy, 2, 1);
  grad.dq = rank4(dq, 2, 1);
  grad.dk = rank4(dk, 2, 1);
  grad.dv = rank4(dv, 2, 1);
  RUN(latent_attention_backward, grad);
  NEAR(dq[0], 0.0);
  NEAR(dk[1], 0.5); /* p (1 - p) (v1 - v0) */
  NEAR(dv[0], 1.5);
  NEAR(dv[1], 0.5);

  float next = 8.0f, y_next;
  START(latent_attention_step, step);
  step.q = rank3(q, 1, 1, 1);
  step.k = rank3(k, 1, 1, 1);
  step.v = rank3(&next, 1, 1, 1);
  step.state = args.final;
  step.y = rank3(&y_next, 1, 1, 1);
  RUN(latent_attention_step, step); /* once: what RUN calls again is refused before it computes */
  NEAR(y_next, 4.0);
  NEAR(norm, 3.0);

  START(state_merge, merge);
  merge.a = args.final;
  merge.b = args.final;
  merge.out = args.final;
  CHECK(latte_state_merge(&merge) == LATTE_OK);
  NEAR(norm, 6.0);
  NEAR(mean, 4.0);
  CHECK(latte_state_merge(NULL) == LATTE_VALUE_ERROR);
}

static void recurrences(void) {
  float a[2] = {0.5f, 0.5f}, b[2] = {1.0f, 3.0f}, h[2], dh[2] = {1.0f, 1.0f}, da[2], db[2];
  START(linear_recurrence_forward, args);
  args.a = rank3(a, 1, 2, 1);
  args.b = rank3(b, 1, 2, 1);
  args.h = rank3(h, 1, 2, 1);
  RUN(linear_recurrence_forward, args);
  NEAR(h[0], 1.0);
  NEAR(h[1], 3.5);

  START(linear_recurrence_backward, grad);
  grad.a = args.a;
  grad.h = args.h;
  grad.dh = rank3(dh, 1, 2, 1);
  grad.da = rank3(da, 1, 2, 1);
  grad.db = rank3(db, 1, 2, 1);
  RUN(linear_recurrence_backward, grad);
  NEAR(db[0], 1.5);
  NEAR(da[1], 1.0);

  /* The first token has the multiplier 1: y = sigmoid(0) x. */
  float x = 3.0f, gate = 0.0f, decay = 0.0f, y, dy = 1.0f, dx, d_gate_a, d_gate_x, d_decay;
  START(rg_lru_forward, unit);
  unit.x = rank3(&x, 1, 1, 1);
  unit.gate_a = unit.gate_x = rank3(&gate, 1, 1, 1);
  unit.log_lambda = vector(&decay, 1);
  unit.y = rank3(&y, 1, 1, 1);
  RUN(rg_lru_forward, unit);
  NEAR(y, 1.5);

  START(rg_lru_backward, unit_grad);
  unit_grad.x = unit.x;
  unit_grad.gate_a = unit_grad.gate_x = unit.gate_a;
  unit_grad.log_lambda = unit.log_lambda;
  unit_grad.y = unit.y;
  unit_grad.dy = rank3(&dy, 1, 1, 1);
  unit_grad.dx = rank3(&dx, 1, 1, 1);
  unit_grad.d_gate_a = rank3(&d_gate_a, 1, 1, 1);
  unit_grad.d_gate_x = rank3(&d_gate_x, 1, 1, 1);
  unit_grad.d_log_lambda = vector(&d_decay, 1);
  RUN(rg_lru_backward, unit_grad);
  NEAR(dx, 0.5);
  NEAR(d_gate_x, 0.75); /* x sigmoid' */
  NEAR(d_gate_a, 0.0);
}

static void convolution(void) {
  float x[2] = {1.0f, 2.0f}, weight[2] = {10.0f, 1.0f}, bias = 0.5f, y[2];
  float dy[2] = {1.0f, 1.0f}, dx[2], d_weight[2], d_bias;
  START(short_conv_forward, args);
  CHECK(args.causal);
  args.x = rank3(x, 1, 2, 1);
  args.weight = matrix(weight, 1, 2);
  args.bias = vector(&bias, 1);
  args.y = rank3(y, 1, 2, 1);
  RUN(short_conv_forward, args);
  NEAR(y[0], 1.5);
  NEAR(y[1], 12.5);

  START(short_conv_backward, grad);
  grad.x = args.x;
  grad.weight = args.weight;
  grad.dy = rank3(dy, 1, 2, 1);
  grad.dx = rank3(dx, 1, 2, 1);
  grad.d_weight = matrix(d_weight, 1, 2);
  grad.d_bias = vector(&d_bias, 1);
  RUN(short_conv_backward, grad);
  NEAR(dx[0], 11.0);
  NEAR(d_weight[1], 3.0);
  NEAR(d_bias, 2.0);
}

/* Equal keys in a window of 2, and a latent that half of the probability goes to. */
static void windows(void) {
  float y[2], log_sum[2], wide[2];
  START(sliding_window_forward, args);
  CHECK(args.window == 1 && args.causal && args.scale == 1.0 && args.softcap == 0.0);
  args.q = args.k = rank4(k, 2, 1);
  args.v = rank4(v, 2, 1);
  args.y = rank4(y, 2, 1);
  args.log_sum = latte_dense(log_sum, LATTE_FLOAT32, 3, (int64_t[]){1, 1, 2});
  args.wide = rank4(wide, 2, 1);
  args.window = 2;
  RUN(sliding_window_forward, args);
  NEAR(y[1], 2.0);
  NEAR(log_sum[1], 4.0 + log(2.0));

  float dy[2] = {1.0f, 1.0f}, dq[2], dk[2], dv[2];
  START(sliding_window_backward, grad);
  grad.q = grad.k = args.k;
  grad.v = args.v;
  grad.log_sum = args.log_sum;
  grad.wide = args.wide;
  grad.dy = rank4(dy, 2, 1);
  grad.dq = rank4(dq, 2, 1);
  grad.dk = rank4(dk, 2, 1);
  grad.dv = rank4(dv, 2, 1);
  grad.window = 2;
  RUN(sliding_window_backward, grad);
  NEAR(dv[0], 1.5);

  float choice[4] = {0.0f, 0.0f, 0.0f, 0.0f}, total[2], dq_latent[4], dk_latent[2], dv_latent[2];
  START(macchiato_forward, both);
  both.q_latent = rank4(choice, 2, 2);
  both.latent.k = rank4(k, 2, 1);
  both.latent.v = args.v;
  both.latent.y = rank4(total, 2, 1);
  both.window = args;
  RUN(macchiato_forward, both);
  NEAR(y[1], 2.0);

  START(macchiato_backward, both_grad);
  CHECK(!both_grad.one_value);
  both_grad.q_latent = both.q_latent;
  both_grad.y = both.latent.y;
  both_grad.latent.k = both.latent.k;
  both_grad.latent.v = both.latent.v;
  both_grad.latent.dk = rank4(dk_latent, 2, 1);
  both_grad.latent.dv = rank4(dv_latent, 2, 1);
  both_grad.window = grad;
  both_grad.dq_latent = rank4(dq_latent, 2, 2);
  RUN(macchiato_backward, both_grad);
  NEAR(dv[0] + dv_latent[0], 1.5);

  float key[2] = {0.0f}, value[2] = {0.0f}, y_step;
  unsigned char valid[2] = {0, 0};
  int64_t position = 0;
  START(sliding_window_step, step);
  step.q = step.k = rank3(k, 1, 1, 1);
  step.v = rank3(v, 1, 1, 1);
  step.ring.key = rank4(key, 2, 1);
  step.ring.value = rank4(value, 2, 1);
  step.ring.valid = latte_dense(valid, LATTE_BOOLEAN, 2, (int64_t[]){1, 2});
  step.ring.position = latte_dense(&position, LATTE_INT64, 1, (int64_t[]){1});
  step.y = rank3(&y_step, 1, 1, 1);
  RUN(sliding_window_step, step);
  NEAR(y_step, 1.0);
  CHECK(position == 1 && valid[0] && !valid[1]);

  float max = -INFINITY, norm = 0.0f, mean = 0.0f;
  START(macchiato_step, both_step);
  both_step.q_latent = rank3(choice, 1, 1, 2);
  both_step.latent.k = rank3(k, 1, 1, 1);
  both_step.latent.v = rank3(v + 1, 1, 1, 1);
  both_step.latent.state.max = rank3(&max, 1, 1, 1);
  both_step.latent.state.norm = rank3(&norm, 1, 1, 1);
  both_step.latent.state.mean = rank4(&mean, 1, 1);
  both_step.window = step;
  both_step.window.v = both_step.latent.v;
  RUN(macchiato_step, both_step);
  NEAR(y_step, 2.5); /* the window averages 1 and 3, the latent has seen 3 alone */
}

static void rotation(void) {
  float x[2] = {1.0f, 0.0f}, y[2];
  int64_t position = 1;
  START(rotate, args);
  CHECK(args.base == 10000.0);
  args.x = rank4(x, 1, 2);
  args.position = latte_dense(&position, LATTE_INT64, 1, (int64_t[]){1});
  args.y = rank4(y, 1, 2);
  args.dim = 2;
  RUN(rotate, args);
  NEAR(y[0], cos(1.0));
  NEAR(y[1], sin(1.0));
}

/* A message names the operator, what it got and what it expected; nothing is thrown into C. */
static void errors(void) {
  int64_t bytes;
  START(rotate, args);
  CHECK(latte_rotate_workspace(&args, 1, &bytes) == LATTE_VALUE_ERROR);
  CHECK(strncmp(latte_last_error(), "[rotate] x has shape", 20) == 0);
  CHECK(latte_rotate_workspace(&args, 1, NULL) == LATTE_VALUE_ERROR);
  CHECK(latte_rotate_workspace(NULL, 1, &bytes) == LATTE_VALUE_ERROR);

  float x[2];
  args.x = args.y = rank4(x, 1, 2);
  args.x.dtype = 99;
  args.dim = 2;
  CHECK(latte_rotate_workspace(&args, 1, &bytes) == LATTE_TYPE_ERROR);
  CHECK(strstr(latte_last_error(), "x has dtype unknown, expected") != NULL);
  int64_t long_shape[5] = {1, 1, 1, 1, 1};
  args.x = latte_dense(x, LATTE_FLOAT32, 5, long_shape);
  CHECK(latte_rotate_workspace(&args, 1, &bytes) == LATTE_VALUE_ERROR);

  CHECK(strlen(latte_version()) > 0);
  CHECK(latte_cpu_isa() != NULL);
}

int main(void) {
  CHECK(strcmp(latte_last_error(), "") == 0);
  if (latte_cpu_isa() == NULL) return 77; /* ctest: skipped, this machine lacks LATTE_CPU_ISA */
  latent_attention();
  recurrences();
  convolution();
  windows();
  rotation();
  errors();
  if (failures == 0) puts("latte_c.h: all checks hold");
  return failures != 0;
}
