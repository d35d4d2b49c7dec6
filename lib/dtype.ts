import { describeValue } from './arguments.js'
import { refuse } from './errors.js'

/** The type of a tensor's elements. */
export type DType = 'f32' | 'f16' | 'bf16' | 'i32' | 'u8'
const floatTypes = ['f32', 'f16', 'bf16'] as const
/** The floating-point types: of activations, weights and gradients. */
export type FloatDType = (typeof floatTypes)[number]

/** The types of patches: normalised values, or the bytes that they are made of. */
export type PatchDType = FloatDType | 'u8'

/** @internal The typed array that holds a dtype on the host; f16 and bf16 are raw bits there. */
export const hostTypes: Readonly<{
  f32: Float32ArrayConstructor
  f16: Uint16ArrayConstructor
  bf16: Uint16ArrayConstructor
  i32: Int32ArrayConstructor
  u8: Uint8ArrayConstructor
}> = {
  f32: Float32Array,
  f16: Uint16Array,
  bf16: Uint16Array,
  i32: Int32Array,
  u8: Uint8Array,
} satisfies Record<DType, unknown>

/** @internal */
export function isDType(value: unknown): value is DType {
  return typeof value === 'string' && Object.hasOwn(hostTypes, value)
}

/** @internal A dtype given by the caller; any other value is ERR_DTYPE. */
export function checkDType(value: unknown, op: string): void {
  if (!isDType(value))
    refuse('ERR_DTYPE', op, `dtype must be f32, f16, bf16, i32 or u8, got ${describeValue(value)}`)
}

/** @internal */
export function isFloatDType(value: unknown): value is FloatDType {
  return floatTypes.includes(value as FloatDType)
}

/** @internal An argument that must be a float type. */
export function checkFloatDType(value: unknown, name: string, op: string): FloatDType {
  if (!isFloatDType(value))
    refuse('ERR_DTYPE', op, `${name} must be f32, f16 or bf16, got ${describeValue(value)}`)
  return value
}
