/* SPDX-License-Identifier: Apache-2.0 */
#include <latte/latte_c.h>
#include <stdio.h>

int main(void) {
  latte_rotate_args args;
  int64_t bytes;
  if (latte_rotate_init(&args, sizeof args) != LATTE_OK) return 1;
  if (latte_rotate_workspace(&args, 1, &bytes) != LATTE_VALUE_ERROR) return 1;
  printf("latte %s: %s\n", latte_version(), latte_last_error());
  return 0;
}
