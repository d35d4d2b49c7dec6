// Every mistake in a call is a P2RError: all exported functions, constructors and methods, called with nothing,
// with what is no argument of theirs, and methods on what is no instance.
import * as library from 'p2r-kernels'
import {
  collectEvidence,
  type Device,
  functionPolicy,
  OpenAIPolicy,
  openDevice,
  P2RError,
  Perceiver,
  PraGrpo,
  Reasoner,
  RecordedPolicy,
  recordPolicy,
} from 'p2r-kernels'
import { afterAll, describe, expect, test } from 'vitest'

const device = openDevice('cpu')
afterAll(() => device.dispose())

class Stranger {
  strange = 1
}
const bad: [string, unknown][] = [
  ['undefined', undefined],
  ['null', null],
  ['a number', 5],
  ['a string', 'abc'],
  ['an array', [1]],
  ['an object of unknown fields', { strange: 1 }],
  ['an object of another class', new Stranger()],
]

/** What a call throws or rejects with; undefined where it accepts the arguments. */
async function thrownBy(f: () => unknown): Promise<unknown> {
  try {
    const made = await f()
    // A generator's body runs with its first step.
    if (typeof (made as AsyncGenerator | undefined)?.next === 'function')
      await (made as AsyncGenerator).next()
    if (made !== device) (made as Partial<Device> | undefined)?.dispose?.()
  } catch (error) {
    return error ?? new Error('threw nothing')
  }
  return undefined
}

async function expectP2RErrors(call: (...a: unknown[]) => unknown, isFine = false): Promise<void> {
  const wrong: string[] = []
  let refused = 0
  // In the first place, in the second, and in both.
  for (const [name, value] of bad)
    for (const [where, args] of [
      ['first', [value]],
      ['second', [undefined, value]],
      ['both', [value, value]],
    ] as const) {
      const error = await thrownBy(() => call(...args))
      if (error === undefined) continue
      refused++
      if (!(error instanceof P2RError) || !/^\[\w+\] |made by|opened by/.test(error.message))
        wrong.push(`${name} ${where}: ${error}`)
    }
  expect(wrong).toEqual([])
  if (!isFine) expect(refused).toBeGreaterThan(0)
}

/** Functions for which every value is fine: an error takes any message, and some take nothing. */
const acceptsAnything = new Set(['P2RError', 'devices', 'cudaStatus', 'reproductionSettings'])

type Class = (new (...a: unknown[]) => object) & { prototype: object }
const isClass = (value: unknown): value is Class =>
  typeof value === 'function' && /^class\b/.test(Function.prototype.toString.call(value))

async function expectRefusedOnStrangers(prototype: object): Promise<void> {
  const members = Object.entries(Object.getOwnPropertyDescriptors(prototype))
  for (const [key, { value: f, get }] of members)
    if (key !== 'constructor' && (f ?? get))
      for (const [what, other] of [...bad, ['its prototype', prototype]] as const) {
        const error = await thrownBy(() => Reflect.apply(f ?? get, other, []))
        expect(error, `${key} of ${what}`).toBeInstanceOf(P2RError)
      }
}

describe.each(Object.entries(library).filter(([, f]) => typeof f === 'function'))(
  '%s',
  (name, value) => {
    const accepts = acceptsAnything.has(name)
    if (!isClass(value)) {
      test('refuses bad arguments', () => expectP2RErrors(value as () => unknown, accepts))
      return
    }
    test('its constructor refuses bad arguments', () =>
      expectP2RErrors((...a) => new (value as Class)(...a), accepts))

    const statics = Object.entries(Object.getOwnPropertyDescriptors(value)).filter(
      ([key, { value: f }]) => typeof f === 'function' && key !== 'is' && key !== 'handle',
    )
    for (const [key, { value: f }] of statics)
      if (!(f as { prototype?: unknown }).prototype)
        test(`its static method ${key} refuses bad arguments`, () => expectP2RErrors(f.bind(value)))

    test('its members are refused on anything but an instance', () =>
      expectRefusedOnStrangers(value.prototype))
  },
)

describe('methods of instances', () => {
  const policy = functionPolicy(() => '[]')
  const image = device.zeros([8, 8, 3], 'u8')
  const instances: [string, object][] = [
    ['functionPolicy', policy],
    ['recordPolicy', recordPolicy(policy, 'never-written')],
    [
      'OpenAIPolicy',
      new OpenAIPolicy({ baseURL: 'http://127.0.0.1:9/v1', model: 'm', maxRetries: 0 }),
    ],
    ['Perceiver', new Perceiver(policy)],
    ['Reasoner', new Reasoner(policy)],
    ['PraGrpo', new PraGrpo({ perceiver: policy, reasoner: policy, device })],
    ['Evidence', collectEvidence({ image, boxes: [] })],
    ['Tensor', image],
    ['Device', device],
  ]
  for (const [name, instance] of instances) {
    const own = Object.getPrototypeOf(instance)
    const members = Object.getOwnPropertyDescriptors(own === Object.prototype ? instance : own)
    for (const [key, { value: f }] of Object.entries(members))
      if (typeof f === 'function' && !['constructor', 'dispose', 'metrics'].includes(key))
        test(`${name}.${key} refuses bad arguments`, () =>
          expectP2RErrors((...a) => Reflect.apply(f, instance, a), f.length === 0))
  }

  for (const [name, instance] of instances.slice(2))
    test(`${name}: members of its prototype are refused on anything but an instance`, () =>
      expectRefusedOnStrangers(Object.getPrototypeOf(instance)))

  test('Answer and RolloutBatch: likewise', async () => {
    const reasoner = functionPolicy(() => '<answer>A</answer>')
    const a = { image, question: 'q', answerForm: 'mca' as const }
    const made = await library.answer({
      perceiver: new Perceiver(policy),
      reasoner: new Reasoner(reasoner),
      ...a,
    })
    const trainer = new PraGrpo({ perceiver: policy, reasoner, device, groupSize: 2 })
    const batch = await trainer.rollout([{ ...a, truth: 'A' }])
    for (const instance of [made, batch]) {
      await expectRefusedOnStrangers(Object.getPrototypeOf(instance))
      instance.dispose()
      instance.dispose()
    }
  })

  test('a detached method, and one of a class without instances here', async () => {
    const { perceive } = new Perceiver(policy)
    await expect(perceive({ image, question: 'q' })).rejects.toMatchObject({
      code: 'ERR_VALUE',
      message: '[perceive] must be called as a method of a Perceiver',
    })
    const { generate } = RecordedPolicy.prototype
    await expect(generate({} as never)).rejects.toMatchObject({ code: 'ERR_VALUE' })
  })
})

describe('unknown options are refused with the nearest known one', () => {
  const policy = functionPolicy(() => '[]')
  const pra = (options: object) => () =>
    new PraGrpo({ perceiver: policy, reasoner: policy, device, ...options })
  const image = device.zeros([8, 8, 3], 'u8')
  const cases: [string, () => unknown, string][] = [
    ['PraGrpo', pra({ groupsize: 4 }), "'groupsize'; did you mean 'groupSize'?"],
    ['PraGrpo', pra({ loss: { clipHi: 0.3 } }), "'loss.clipHi'; did you mean 'loss.clipHigh'?"],
    ['PraGrpo', pra({ schedule: { perceiver: 1, reasoner: 1, reason: 1 } }), "'schedule.reason'"],
    ['PraGrpo', pra({ evidence: { maxPixel: 4096 } }), "did you mean 'evidence.maxPixels'?"],
    ['PraGrpo', pra({ maxTokens: { perceivers: 1 } }), "did you mean 'maxTokens.perceiver'?"],
    ['PraGrpo', pra({ prompts: { forms: { MCA: 'x' } } }), "did you mean 'prompts.forms.mca'?"],
    ['Perceiver', () => new Perceiver(policy, { max_tokens: 3 } as never), "'maxTokens'?"],
    ['Reasoner', () => new Reasoner(policy, { rule: 'strict' } as never), "'rules'?"],
    [
      'OpenAIPolicy',
      () => new OpenAIPolicy({ baseURL: 'http://x/v1', model: 'm', timeout: 3 } as never),
      "'timeoutMs'?",
    ],
    [
      'collectEvidence',
      () => collectEvidence({ image, boxes: [], maxPixel: 9 } as never),
      "'maxPixels'?",
    ],
    [
      'grpoStep',
      () => library.grpoStep({ clipHi: 0.3 } as never),
      "'clipHi'; did you mean 'clipHigh'?",
    ],
    ['evaluate', () => library.evaluate({ question: [] } as never), "'questions'?"],
    ['paperSettings', () => library.paperSettings({ sample: 3 } as never), "'samples'?"],
  ]
  test.each(cases)('%s: %#', (op, f, message) => {
    expect(f).toThrow(
      expect.objectContaining({ code: 'ERR_VALUE', op, message: expect.stringContaining(message) }),
    )
  })
})
