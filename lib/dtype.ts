export type DType = 'f32' | 'f16' | 'bf16' | 'i32' | 'u8'
/** The types of real numbers. */
export type FloatDType = 'f32' | 'f16' | 'bf16'

/** @internal The typed array that holds a dtype on the host; f16 and bf16 are raw bits there. */
export const hostTypes = {
  f32: Float32Array,
  f16: Uint16Array,
  bf16: Uint16Array,
  i32: Int32Array,
  u8: Uint8Array,
} as const satisfies Record<DType, unknown>

/** @internal */
export function isDType(value: unknown): value is DType {
  return typeof value === 'string' && Object.hasOwn(hostTypes, value)
}
