/* each_dtype.h: BODY for each dtype of x. */
#define DTYPE f32
#include BODY
#undef DTYPE

#define DTYPE f16
#include BODY
#undef DTYPE

#define DTYPE bf16
#include BODY
#undef DTYPE
