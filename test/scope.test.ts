import { gelu, openDevice, scope, scopeAsync, type Tensor } from 'p2r-kernels'
import { afterAll, beforeEach, expect, test } from 'vitest'
import { held } from '../dist/lib/tensor.js'

const device = openDevice('cpu')
afterAll(() => device.dispose())

const made: Tensor[] = []
beforeEach(() => {
  for (const x of made.splice(0)) x.dispose()
})
function make(value = 1): Tensor {
  const x = device.tensor([value], [1])
  made.push(x)
  return x
}
const alive = async (x: Tensor): Promise<boolean> =>
  x.read().then(
    () => true,
    (error) => {
      expect(error).toMatchObject({ code: 'ERR_DISPOSED' })
      return false
    },
  )
const turn = () => new Promise((resolve) => setImmediate(resolve))

test('disposes tensors that are not in the result', async () => {
  const before = make()
  const [kept, left] = scope(() => {
    const left = make()
    const y = gelu({ x: left })
    return [y, left.size] as const
  })
  expect(left).toBe(1)
  expect(await alive(kept)).toBe(true)
  expect(await alive(made[1]!)).toBe(false)
  expect(await alive(before)).toBe(true)
  expect(scope(() => 5)).toBe(5)
  expect(scope(() => null)).toBe(null)
})

test('applies to tensors of every device', async () => {
  using other = openDevice('cpu')
  scope(() => void made.push(other.zeros([3])))
  expect(other.memory().liveBytes).toBe(0)
})

test('searches arrays, objects, maps, sets and held results', async () => {
  const result = scope(() => {
    const cyclic: { self?: unknown; x: Tensor } = { x: make() }
    cyclic.self = cyclic
    return {
      list: [make(), [make()]],
      map: new Map([['a', make()]]),
      keys: new Map([[make(), 1]]),
      set: new Set([make()]),
      held: held({ out: make(), many: [make()] }),
      cyclic,
      text: 'abc',
      data: new Float32Array(4),
      none: undefined,
    }
  })
  expect(made).toHaveLength(8)
  for (const x of made) expect(await alive(x)).toBe(true)
  result.held.dispose()
  expect(await alive(result.held.out)).toBe(false)
})

test('a returned view keeps the storage', async () => {
  const view = scope(() => make(7).reshape([1, 1]))
  made.push(view)
  expect(await alive(made[0]!)).toBe(false)
  expect(Array.from(await view.read())).toEqual([7])
})

test('nested: what an inner scope keeps belongs to the outer one', async () => {
  const outer = scope(() => {
    const inner = scope(() => [make(), make()] as const)
    scope(() => make(3))
    return inner[0]
  })
  expect(outer).toBe(made[0])
  expect(await Promise.all(made.map(alive))).toEqual([true, false, false])
})

test('an error disposes everything and is rethrown', async () => {
  const own = new Error('mine')
  const thrown = () =>
    scope(() => {
      make()
      scope(() => make())
      throw own
    })
  expect(thrown).toThrow(own)
  await expect(
    scopeAsync(async () => {
      make()
      await turn()
      make()
      throw own
    }),
  ).rejects.toBe(own)
  expect(await Promise.all(made.map(alive))).toEqual([false, false, false, false])
})

test('asynchronous scopes include tensors made across their awaits', async () => {
  const kept = await scopeAsync(async () => {
    make()
    await turn()
    const x = make()
    await x.read()
    return { x: gelu({ x }) }
  })
  made.push(kept.x)
  expect(await Promise.all(made.map(alive))).toEqual([false, false, true])
})

test('interleaved scopes keep their tensors apart', async () => {
  const run = (keep: boolean) =>
    scopeAsync(async () => {
      const mine = make()
      for (let i = 0; i < 5; i++) {
        await turn()
        expect(await alive(mine)).toBe(true)
        scope(() => make())
      }
      return keep ? mine : undefined
    })
  const outside = make()
  const results = await Promise.all([run(true), run(false), run(true), run(false)])
  expect(results.filter((x) => x !== undefined)).toHaveLength(2)
  const living = (await Promise.all(made.map(alive))).filter(Boolean)
  expect(living).toHaveLength(3)
  expect(await alive(outside)).toBe(true)
})

test('a synchronous scope inside an asynchronous one passes its result to it', async () => {
  const inner = await scopeAsync(async () => {
    const x = scope(() => make())
    await turn()
    expect(await alive(x)).toBe(true)
  })
  expect(inner).toBeUndefined()
  expect(await alive(made[0]!)).toBe(false)
})

test('a scope around a long loop does not grow', () => {
  using other = openDevice('cpu')
  scope(() => {
    for (let i = 0; i < 10_000; i++) other.zeros([1000]).dispose()
    expect(other.memory()).toMatchObject({ liveBytes: 0, peakBytes: 4000 })
  })
})
