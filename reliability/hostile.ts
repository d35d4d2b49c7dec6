// Turns the arguments of a valid call into those of a hostile one.
import vm from 'node:vm'
import fc from 'fast-check'
import { type Device, openDevice, type Tensor } from 'p2r-kernels'
import type { Arguments } from './calls.js'
import type { Gen } from './gen.js'

/** What a getter, proxy or callback of the fuzz throws: it is its own, and comes out as it went in. */
export class Planted extends Error {}

const foreign = vm.createContext({})
const isTensor = (value: unknown): value is Tensor =>
  typeof value === 'object' &&
  value !== null &&
  'dtype' in value &&
  'slice' in value &&
  'device' in value

/** Values that fast-check makes of a seed: nested objects, sparse arrays, odd keys, bigints, dates, typed arrays. */
export function oddities(seed: number, count: number): unknown[] {
  const anything = fc.anything({
    maxDepth: 2,
    withBigInt: true,
    withBoxedValues: true,
    withDate: true,
    withMap: true,
    withNullPrototype: true,
    withSet: true,
    withSparseArray: true,
    withTypedArray: true,
  })
  return fc.sample(anything, { seed, numRuns: count })
}

/** Of one batch of calls: what arguments can be replaced by. */
export class Hostility {
  readonly #gen: Gen
  readonly #odd: readonly unknown[]
  readonly #disposed: Tensor
  /** Another device of the process, and a tensor there. */
  readonly #other: Device
  readonly #stranger: Tensor
  /** Whether what was planted acts: not while arguments are still being made. */
  #armed = false

  constructor(gen: Gen, seed: number) {
    this.#gen = gen
    this.#odd = oddities(seed, 200)
    this.#disposed = gen.f32([3])
    this.#disposed.dispose()
    this.#other = openDevice('cpu', { threads: 1 })
    this.#stranger = this.#other.zeros([4])
  }

  dispose(): void {
    this.#other.dispose()
  }

  /** The arguments with one to three places changed. */
  spoil(given: Arguments): unknown[] {
    const args = [...given]
    this.#armed = false
    for (let times = this.#gen.int(1, 3); times > 0; times--)
      try {
        this.#spoilOne(args)
      } catch {
        // A place that an earlier change has spoiled: a proxy of a tensor, an object that only looks like a list.
      }
    this.#armed = true
    return args
  }

  #spoilOne(args: unknown[]): void {
    const g = this.#gen
    // A walk from the argument list to a random place in it.
    let place: object = args
    for (let depth = 0; depth < 4; depth++) {
      const keys = Object.keys(place)
      if (!keys.length) break
      const key = g.pick(keys) as never
      const value: unknown = place[key]
      const inner =
        typeof value === 'object' &&
        value !== null &&
        !isTensor(value) &&
        !ArrayBuffer.isView(value)
      const plain =
        inner &&
        // Lists that an earlier change has made long are not copied here.
        (Array.isArray(value)
          ? value.length < 1e4
          : Object.getPrototypeOf(value) === Object.prototype)
      if (plain && g.uniform() < 0.8) {
        // Copied, because the call may have frozen or kept it.
        const copy: object = Array.isArray(value) ? [...value] : { ...value }
        if (!Reflect.set(place, key, copy)) return
        place = copy
        continue
      }
      this.#replace(place, key, value, args)
      return
    }
    this.#replace(
      place,
      // The number of arguments stays: it is passed by a spread.
      g.pick([...Object.keys(place), 'unknownOption', '0', place === args ? '1' : 'length']),
      undefined,
      args,
    )
  }

  #replace(place: object, key: string, value: unknown, args: readonly unknown[]): void {
    const g = this.#gen
    const put = (given: unknown): void => {
      try {
        Reflect.set(place, key, given)
      } catch {
        // A length that no array has.
      }
    }
    switch (g.int(0, 9)) {
      case 0:
        Reflect.deleteProperty(place, key)
        break
      case 1:
        put(g.pick(this.#odd))
        break
      case 2:
        put(g.pick(hard)())
        break
      case 3:
        put(typeof value === 'number' ? g.pick(numbers) : g.pick(hard)())
        break
      case 4:
        put(this.#tensorFor(value, args))
        break
      case 5:
        this.#getter(place, key, value, args)
        break
      case 6:
        put(this.#proxy(value, args))
        break
      case 7:
        put(inAnotherRealm(value))
        break
      case 8:
        put(resized(value, g))
        break
      default:
        if (place !== args)
          Reflect.set(
            place,
            g.pick(['unknownOption', 'causal', 'dtype', 'inPlace', '__proto__']),
            g.pick(this.#odd),
          )
    }
  }

  /** A tensor in place of a value: of another type or shape, disposed, of another device, or a view of another argument. */
  #tensorFor(value: unknown, args: readonly unknown[]): unknown {
    const g = this.#gen
    const others = tensorsOf(args)
    switch (g.int(0, 6)) {
      case 0:
        return this.#disposed
      case 1:
        return this.#stranger
      case 2:
        return g.tensor(g.list(g.int(0, 4), 0, 6), g.pick(['f32', 'f16', 'bf16', 'u8', 'i32']))
      case 3:
        return others.length ? g.pick(others) : this.#disposed
      case 4: {
        // Shifted by a row, so that input and output overlap in part.
        const from = others.filter((t) => t.shape.length > 0 && (t.shape[0] ?? 0) > 1)
        if (!from.length) return undefined
        const of = g.pick(from)
        return of.slice(1, of.shape[0])
      }
      case 5:
        return isTensor(value)
          ? Object.create(Object.getPrototypeOf(value))
          : { ...(value as object) }
      default:
        return isTensor(value) ? value.cast(g.pick(['f32', 'f16', 'u8'])) : value
    }
  }

  /** What runs while arguments are read: it throws, lies, or disposes of what it finds. */
  #strike(args: readonly unknown[]): void {
    if (!this.#armed) return
    const g = this.#gen
    const tensors = tensorsOf(args)
    switch (g.int(0, 3)) {
      case 0:
        throw new Planted('thrown by a getter')
      case 1:
        if (tensors.length) g.pick(tensors).dispose()
        break
      case 2:
        for (const list of args) if (Array.isArray(list)) list.length = 0
        break
      default:
    }
  }

  #getter(place: object, key: string, value: unknown, args: readonly unknown[]): void {
    let times = 0
    const odd = this.#gen.pick(this.#odd)
    const again = this.#gen.uniform() < 0.5
    try {
      Object.defineProperty(place, key, {
        configurable: true,
        enumerable: true,
        get: () => {
          if (++times === 1 || again) this.#strike(args)
          return times > 1 && again ? odd : value
        },
      })
    } catch {
      // The length of an array.
    }
  }

  #proxy(value: unknown, args: readonly unknown[]): unknown {
    if (typeof value !== 'object' || value === null) return new Proxy([], {})
    const strike = (): void => this.#strike(args)
    const rare = (): void => {
      if (this.#gen.uniform() < 0.2) strike()
    }
    return new Proxy(value, {
      get: (target, key) => {
        rare()
        try {
          return Reflect.get(target, key)
        } catch {
          // Of a typed array's prototype, for instance, which an earlier change made the target's own.
          throw new Planted('thrown by a proxy')
        }
      },
      ownKeys: (target) => {
        rare()
        return Reflect.ownKeys(target)
      },
      getPrototypeOf: (target) => {
        rare()
        return Reflect.getPrototypeOf(target)
      },
    })
  }
}

/** Tensors among arguments, and in lists and objects of them. */
export function tensorsOf(value: unknown, depth = 0): Tensor[] {
  if (isTensor(value)) return [value]
  if (depth > 2 || typeof value !== 'object' || value === null) return []
  const found: Tensor[] = []
  for (const descriptor of Object.values(Object.getOwnPropertyDescriptors(value)))
    if ('value' in descriptor) found.push(...tensorsOf(descriptor.value, depth + 1))
  return found
}

const numbers = [
  -1,
  0,
  -0,
  0.5,
  1.5,
  -1e-300,
  1e300,
  2 ** 31 - 1,
  2 ** 31,
  2 ** 32,
  2 ** 40,
  2 ** 53,
  2 ** 62,
  2 ** 64,
  Number.NaN,
  Number.POSITIVE_INFINITY,
  Number.NEGATIVE_INFINITY,
  Number.MIN_VALUE,
] // prettier-ignore

const hard: readonly (() => unknown)[] = [
  () => undefined,
  () => null,
  () => Symbol('s'),
  () => 10n ** 30n,
  () => 'x'.repeat(1000),
  () => 'a\0b',
  () => '\ud800',
  () => () => {
    throw new Planted('thrown by a function')
  },
  () => [],
  () => [null, '', false],
  () => Object.assign([], { length: 3 }),
  () => ({ length: 2 ** 40 }),
  () => ({ length: -1 }),
  () => Object.freeze({}),
  () => Object.create(null),
  () => new Float64Array(3),
  () => new BigInt64Array(2),
  () => new Uint8ClampedArray(2),
  () => new DataView(new ArrayBuffer(4)),
  () => new Int32Array(new SharedArrayBuffer(8)),
  () => detached(),
  () =>
    new (class extends Array {
      override get length(): number {
        throw new Planted('thrown by a length')
      }
    })(),
  () => ({
    valueOf: () => {
      throw new Planted('thrown by valueOf')
    },
    toString: () => {
      throw new Planted('thrown by toString')
    },
  }),
  // biome-ignore lint/suspicious/noThenProperty: a thenable is the point.
  () => ({ then: (f: (value: unknown) => void) => f(1) }),
  () => new Date(Number.NaN),
  () => /a/g,
  () => new Error('e'),
  () => Promise.resolve(1),
  () => new Map([[1, 2]]),
  () => globalThis,
]

function detached(): Float32Array {
  const array = new Float32Array(4)
  structuredClone(array, { transfer: [array.buffer] })
  return array
}

/** Arrays and plain objects as another global object's; other values as they are. */
function inAnotherRealm(value: unknown): unknown {
  if (Array.isArray(value) && value.length < 1e4)
    return vm.runInContext('(list) => [...list]', foreign)(value)
  if (ArrayBuffer.isView(value) && 'BYTES_PER_ELEMENT' in value)
    return vm.runInContext('(name, list) => globalThis[name].from(list)', foreign)(
      value.constructor.name,
      [...(value as unknown as Iterable<number>)],
    )
  if (typeof value === 'object' && value !== null && !isTensor(value))
    return vm.runInContext('(o) => ({ ...o })', foreign)(value)
  return vm.runInContext('[1, 2]', foreign)
}

/** A list with other entries or another length; a number or text likewise. */
function resized(value: unknown, g: Gen): unknown {
  if (typeof value === 'number') return value * g.pick([-1, 2, 1e3, 2 ** 31]) + g.int(-1, 1)
  if (typeof value === 'string')
    return value.slice(g.int(0, 3)) + g.pick(['', '\0', '🙂', '"', '\u2028'])
  if (Array.isArray(value) && value.length < 1e4)
    return g.pick([value.slice(1), [...value, value[0]], value.toReversed(), Array(2 ** 20)])
  if (ArrayBuffer.isView(value) && 'subarray' in value) return (value as Int32Array).subarray(1)
  return value
}
