import {
  applyKlPenalty,
  type GrpoBatch,
  type GrpoModel,
  groupAdvantages,
  grpoStep,
  linear,
  linearBackward,
  policyLoss,
  scope,
  type Tensor,
  tokenLogProbs,
  tokenLogProbsBackward,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import {
  expectClose,
  expectGradient,
  expectRefusal,
  onEveryBackend,
  Random,
  recorded,
} from './harness.js'

// The twin against the CPU: sums of 20 tokens in f32, advantages first rounded to f32.
const bound = { absolute: 2 ** -19, relative: 2 ** -17 }

onEveryBackend('grpo', (b) => {
  const f32 = (x: ArrayLike<number>): Tensor => b.device.tensor(Float32Array.from(x), [x.length])
  const lengths = [4, 3, 6, 0, 5, 2]
  const cuSeqlens = [0, 4, 7, 13, 13, 18, 20]
  const T = 20
  const V = 37
  const random = new Random(2)
  const z = random.normals(T * V, 2)
  const ids = Int32Array.from({ length: T }, () => random.int(0, V - 1))
  const bits = Uint8Array.from({ length: T }, () => +(random.uniform() < 0.7))
  const rewards = [1, 0, 0, 1, 0.5, 0.25]
  const groups = [3, 3, 9, 3, 9, 9]
  const near = random.normals(T, 0.2).map((x) => x - 3)
  const inputs = () => ({
    rewards: f32(rewards),
    groups,
    cuSeqlens,
    mask: b.device.tensor(bits, [T]),
    oldLogProbs: f32(near),
    refLogProbs: f32(near.map((x) => x - 0.1)),
  })
  const logits = () => b.device.tensor(z, [T, V])
  const targets = () => b.device.tensor(ids, [T])
  const kept = lengths.map((n, i) =>
    bits.subarray(cuSeqlens[i], cuSeqlens[i]! + n).reduce((s, x) => s + x, 0),
  )

  for (const estimator of [
    'grpo',
    'dr_grpo',
    'rloo',
    'opo',
    'gdpo',
    'reinforce_pp_baseline',
  ] as const)
    for (const masked of [true, false])
      test(`${estimator}${masked ? ', masked' : ''}: equals its parts`, async () => {
        const { mask, ...rest } = inputs()
        const batch = masked ? { ...rest, mask } : rest
        const { rewards: _, groups: __, ...inLoss } = batch
        const options = { estimator, epsilon: 1e-4 }
        const loss = { klCoef: 0.2, entropyCoef: 0.05, clipHigh: 0.3 }
        const advantages = groupAdvantages({
          rewards: batch.rewards,
          groups,
          lengths: masked ? kept : lengths,
          ...options,
        })
        const forward = tokenLogProbs({
          logits: logits(),
          targets: targets(),
          temperature: 0.7,
          entropy: true,
        })
        const { entropy, logProbs } = forward
        const l = policyLoss({ ...inLoss, ...loss, logProbs, entropy: entropy!, advantages })
        const dLogits = tokenLogProbsBackward({
          logits: logits(),
          targets: targets(),
          temperature: 0.7,
          stats: forward.stats,
          dLogProbs: l.dLogProbs,
          entropy: entropy!,
          dEntropy: l.dEntropy!,
        })
        using step = grpoStep({
          ...batch,
          ...options,
          ...loss,
          logits: logits(),
          targets: targets(),
          temperature: 0.7,
        })
        expect(await step.advantages.read()).toEqual(await advantages.read())
        expect(await step.logProbs.read()).toEqual(await logProbs.read())
        expect(await step.loss.read()).toEqual(await l.loss.read())
        expect(await step.dLogits.read()).toEqual(await dLogits.read())
        expect(await step.metrics()).toEqual(await l.metrics())
        expect(step).not.toHaveProperty('dLogProbs')

        const own = policyLoss({ ...inLoss, logProbs, advantages })
        using direct = recorded(b, `grpo step ${estimator} ${masked}`, bound, () =>
          grpoStep({ ...batch, ...options, logProbs }),
        )
        expect(await direct.dLogProbs.read()).toEqual(await own.dLogProbs.read())
        expect(await direct.logProbs.read()).toEqual(await logProbs.read())
        direct.dispose()
        expect((await logProbs.read()).length).toBe(T) // the caller's stays
      })

  for (const objective of [
    'ppo',
    'gspo',
    'sapo',
    'dppo_tv',
    'gmpo',
    'vespo',
    'luspo',
    'clip_cov',
    'kl_cov',
  ] as const)
    for (const entropyCoef of [0, 0.05])
      test(`${objective} on a linear head, entropyCoef ${entropyCoef}: equals the step on its logits`, async () => {
        const C = 12
        const states = random.normals(T * C)
        const hidden = b.device.tensor(states, [T, C])
        const weight = b.device.tensor(random.normals(V * C, 0.5), [V, C])
        const bias = f32(random.normals(V))
        const options = { ...inputs(), objective, entropyCoef, klCoef: 0.2, temperature: 0.7 }
        using whole = grpoStep({
          ...options,
          logits: linear({ x: hidden, weight, bias }),
          targets: targets(),
        })
        const back = linearBackward({ dOut: whole.dLogits, x: hidden, weight, bias })
        using step = grpoStep({ ...options, hidden, weight, bias, targets: targets() })
        // Some roundings of f32 apart.
        const bound = { absolute: 1e-5, relative: 1e-5 }
        expectClose(await step.loss.read(), await whole.loss.read(), bound)
        expectClose(await step.logProbs.read(), await whole.logProbs.read(), bound)
        expect(await step.advantages.read()).toEqual(await whole.advantages.read())
        expectClose(
          Object.values(await step.metrics()),
          Object.values(await whole.metrics()),
          bound,
        )
        expectClose(await step.dHidden.read(), await back.dX.read(), bound)
        expectClose(await step.dWeight.read(), await back.dWeight.read(), bound)
        expectClose(await step.dBias.read(), await back.dBias!.read(), bound)
        expect(step).not.toHaveProperty('dLogits')

        const wrong = b.device.tensor(new Int32Array(T).fill(V), [T])
        const step2 = grpoStep({ ...options, hidden, weight, targets: wrong })
        expect(step2).not.toHaveProperty('dBias')
        const fault = { code: 'ERR_VALUE', op: 'grpoStep' }
        for (const t of [step2.loss, step2.logProbs, step2.dHidden, step2.dWeight])
          await expect(t.read()).rejects.toMatchObject(fault)
        await expect(step2.metrics()).rejects.toMatchObject(fault)
        await b.device.synchronize()
        step2.dispose()
      })

  test('the tokens of the highest entropy, from logits and through a head', async () => {
    const a = { ...inputs(), topEntropyQuantile: 0.4 }
    const { rewards: given, groups: by, ...inLoss } = a
    const forward = tokenLogProbs({ logits: logits(), targets: targets(), entropy: true })
    const { logProbs, entropy } = forward
    const advantages = groupAdvantages({ rewards: given, groups: by })
    const expected = policyLoss({ ...inLoss, logProbs, entropy, advantages })
    using step = grpoStep({ ...a, logits: logits(), targets: targets() })
    expect(await step.metrics()).toEqual(await expected.metrics())
    const weight = b.device.tensor(random.normals(V * 5), [V, 5])
    const hidden = b.device.tensor(random.normals(T * 5), [T, 5])
    using whole = grpoStep({ ...a, logits: linear({ x: hidden, weight }), targets: targets() })
    using head = grpoStep({ ...a, hidden, weight, targets: targets() })
    expectClose(await head.loss.read(), await whole.loss.read(), { absolute: 1e-5 })
    const back = linearBackward({ dOut: whole.dLogits, x: hidden, weight })
    expectClose(await head.dWeight.read(), await back.dWeight.read(), { absolute: 1e-5 })
    expectRefusal(() => grpoStep({ ...a, logProbs }), 'ERR_VALUE', 'grpoStep', /needs entropy/)
  })

  test('means over prompts take the groups', async () => {
    const { groups: by, rewards: _, ...inLoss } = inputs()
    const logProbs = f32(near.map((x) => x + 0.1))
    const advantages = f32(random.normals(6))
    const o = { aggregation: 'prompt-mean', groups: by } as const
    const expected = policyLoss({ ...inLoss, ...o, logProbs, advantages })
    using step = grpoStep({ ...inLoss, ...o, logProbs, advantages })
    expect(await step.dLogProbs.read()).toEqual(await expected.dLogProbs.read())
  })

  test('KL in the reward', async () => {
    const a = inputs()
    const { rewards: given, groups: by, oldLogProbs, refLogProbs, mask } = a
    const logProbs = f32(near.map((x) => x + 0.1))
    for (const [kl, klCoef] of [
      ['k1', 0.3],
      ['k3', 0.1],
    ] as const) {
      const pair = { logProbs: oldLogProbs, refLogProbs, cuSeqlens, mask, kl, klCoef }
      const less = applyKlPenalty({ rewards: given, ...pair })
      const advantages = groupAdvantages({ rewards: less, groups: by })
      const plain = policyLoss({ logProbs, oldLogProbs, advantages, cuSeqlens, mask })
      using step = grpoStep({ ...a, logProbs, klIn: 'reward', kl, klCoef })
      expect(await step.advantages.read()).toEqual(await advantages.read())
      expect(await step.dLogProbs.read()).toEqual(await plain.dLogProbs.read())
      const of = { logProbs, refLogProbs, advantages, cuSeqlens, mask, kl }
      expect((await step.metrics()).kl).toBe((await policyLoss(of).metrics()).kl)
    }
    // k1 unless another is given; of the model's log-probs where there are no old ones.
    const { oldLogProbs: _, ...onPolicy } = a
    using step = grpoStep({ ...onPolicy, logProbs, klIn: 'reward' })
    const less = applyKlPenalty({ rewards: given, logProbs, refLogProbs, cuSeqlens, mask })
    const advantages = groupAdvantages({ rewards: less, groups: by })
    expect(await step.advantages.read()).toEqual(await advantages.read())
    const refuses = (extra: object, message: RegExp) =>
      expectRefusal(
        () => grpoStep({ ...a, logProbs, klIn: 'reward', ...extra } as never),
        'ERR_VALUE',
        'grpoStep',
        message,
      )
    refuses({ klIn: 'both' }, /klIn/)
    refuses({ refLogProbs: undefined }, /needs refLogProbs/)
    refuses({ klUnbiased: true }, /klUnbiased/)
    refuses({ rewards: undefined, groups: undefined, advantages: given }, /klIn/)
  })

  for (const per of ['sequence', 'token'] as const)
    test(`the caller’s advantages of each ${per}`, async () => {
      const { rewards: _, groups: __, ...batch } = inputs()
      const advantages = f32(random.normals(per === 'token' ? T : lengths.length))
      const options = { ...batch, advantages, advantagesPer: per }
      const logProbs = f32(near.map((x) => x + 0.1))
      const expected = policyLoss({ ...options, logProbs })
      const step = grpoStep({ ...options, logProbs })
      expect(await step.loss.read()).toEqual(await expected.loss.read())
      expect(await step.dLogProbs!.read()).toEqual(await expected.dLogProbs.read())
      expect(await step.advantages.read()).toEqual(await advantages.read())
      step.dispose()
      expect((await advantages.read()).length).toBe(advantages.size) // the caller's stays
    })

  test('opt_baseline gives each token its advantage', async () => {
    const { mask, oldLogProbs, refLogProbs: _, ...rest } = inputs()
    const squaredProbs = f32(random.normals(T).map((x) => Math.abs(x) / 9))
    const importanceWeights = f32(random.normals(T).map(Math.abs))
    const options = { estimator: 'opt_baseline', squaredProbs, importanceWeights } as const
    for (const masked of [{}, { mask }]) {
      const expected = groupAdvantages({
        ...rest,
        ...masked,
        ...options,
        logProbs: oldLogProbs,
      })
      using step = grpoStep({ ...rest, ...masked, ...options, oldLogProbs, logProbs: oldLogProbs })
      expect(step.advantages.shape).toEqual([T])
      expect(await step.advantages.read()).toEqual(await expected.read())
    }
  })

  test('the gradient reaches the logits', async () => {
    const { oldLogProbs, refLogProbs, ...batch } = inputs()
    const advantages = await groupAdvantages({ rewards: f32(rewards), groups }).read()
    using step = grpoStep({ ...batch, objective: 'gpg', logits: logits(), targets: targets() })
    // gpg without KL: -A logp, a mean over the kept tokens.
    const f = (x: Float64Array): number => {
      let sum = 0
      let n = 0
      for (let i = 0; i < 6; i++)
        for (let t = cuSeqlens[i]!; t < cuSeqlens[i + 1]!; t++) {
          if (!bits[t]) continue
          const row = x.subarray(t * V, (t + 1) * V)
          const lse = Math.log(row.reduce((s, v) => s + Math.exp(v), 0))
          sum -= advantages[i]! * (row[ids[t]!]! - lse)
          n++
        }
      return sum / n
    }
    const bound = { absolute: 1e-7, relative: 1e-5, entries: 60 }
    expectGradient(f, z, await step.dLogits.read(), bound)
    for (const t of [oldLogProbs, refLogProbs]) t.dispose()
  })

  const poisoned: [string, () => Partial<GrpoBatch> & Partial<{ targets: Tensor }>][] = [
    [
      'a target outside the vocabulary',
      () => ({ targets: b.device.tensor(new Int32Array(T).fill(V), [T]) }),
    ],
    ['a reward of NaN', () => ({ rewards: f32([1, NaN, 0, 1, 0, 0]) })],
    ['a mask of 2', () => ({ mask: b.device.tensor(new Uint8Array(T).fill(2), [T]) })],
  ]
  for (const [title, extra] of poisoned)
    test(`${title}: one fault, under one name, on all results`, async () => {
      const a = { ...inputs(), logits: logits(), targets: targets(), ...extra() }
      const step = grpoStep(a as GrpoModel & GrpoBatch)
      const fault = { code: 'ERR_VALUE', op: 'grpoStep' }
      for (const t of [step.loss, step.logProbs, step.advantages, step.dLogits])
        await expect(t!.read()).rejects.toMatchObject(fault)
      await expect(step.metrics()).rejects.toMatchObject(fault)
      await b.device.synchronize()
      expect((await a.rewards.read()).length).toBe(6)
      step.dispose()
    })

  test('log-probs as input stay the caller’s, also after a fault', async () => {
    const logProbs = f32(near)
    const step = grpoStep({ ...inputs(), rewards: f32([1, NaN, 0, 1, 0, 0]), logProbs })
    await expect(step.logProbs.read()).rejects.toMatchObject({ op: 'grpoStep' })
    await b.device.synchronize()
    expect((await logProbs.read()).length).toBe(T)
  })

  test('nothing leaks', async () => {
    const a = { ...inputs(), logits: logits(), targets: targets() }
    // At most, here and below: what earlier tests dropped may be collected meanwhile.
    const before = b.device.memory().liveBytes
    for (let i = 0; i < 3; i++) {
      const step = scope(() => grpoStep({ ...a, entropyCoef: 0.1 }))
      expect((await step.metrics()).tokens).toBe(bits.reduce((s, x) => s + x, 0))
      step.dispose()
    }
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(before)
    expectRefusal(() => grpoStep({ ...a, kl: 'k9' as never }), 'ERR_VALUE', 'grpoStep')
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(before)
  })

  test('an empty batch', async () => {
    using step = grpoStep({
      rewards: b.device.zeros([0]),
      groups: [],
      cuSeqlens: [0],
      logits: b.device.zeros([0, V], 'bf16'),
      targets: b.device.zeros([0], 'i32'),
    })
    expect(Array.from(await step.loss.read())).toEqual([0])
    expect(step.dLogits.shape).toEqual([0, V])
  })

  test('errors carry its name', () =>
    scope(() => {
      const a = { ...inputs(), logits: logits(), targets: targets() }
      const refuses = (extra: object, code: string, message?: RegExp) =>
        expectRefusal(() => grpoStep({ ...a, ...extra } as never), code, 'grpoStep', message)
      refuses({ rewards: f32([1]) }, 'ERR_SHAPE', /groups/)
      refuses({ groups: [1] }, 'ERR_SHAPE', /groups/)
      refuses({ estimator: 'best' }, 'ERR_VALUE', /estimator/)
      refuses({ objective: 'best' }, 'ERR_VALUE', /objective/)
      refuses({ cuSeqlens: [0, 20] }, 'ERR_SHAPE')
      refuses({ cuSeqlens: [0, 4, 7, 13, 13, 18, 21] }, 'ERR_VALUE', /cuSeqlens/)
      refuses({ cuSeqlens: [0, 20], estimator: 'opo' }, 'ERR_SHAPE', /cuSeqlens/)
      refuses({ mask: b.device.zeros([3], 'u8'), estimator: 'opo' }, 'ERR_VALUE', /cuSeqlens/)
      refuses({ advantagesPer: 'token' }, 'ERR_VALUE', /advantagesPer/)
      refuses({ advantages: f32(rewards) }, 'ERR_VALUE', /rewards must be absent/)
      refuses({ estimator: 'opt_baseline' }, 'ERR_VALUE', /squaredProbs/)
      refuses({ estimator: 'opt_baseline', advantagesPer: 'sequence' }, 'ERR_VALUE', /'token'/)
      refuses({ targets: f32([1]) }, 'ERR_DTYPE', /targets/)
      refuses({ temperature: 0 }, 'ERR_VALUE', /temperature/)
      const head = { logits: undefined, hidden: b.device.zeros([T, 2]), weight: f32([1]) }
      refuses(head, 'ERR_SHAPE', /weight/)
      refuses({ hidden: head.hidden }, 'ERR_VALUE', /got logits and hidden/)
      refuses({ logits: logits().slice(1) }, 'ERR_SHAPE', /logits must be \[20, V\]/)
      refuses({ clipHi: 0.3 }, 'ERR_VALUE', /did you mean 'clipHigh'/)
      grpoStep({ ...a, hidden: undefined } as never)
      expectRefusal(
        () => grpoStep({ ...inputs(), logProbs: undefined } as never),
        'ERR_VALUE',
        'grpoStep',
        /logProbs/,
      )
      expectRefusal(() => grpoStep(inputs() as never), 'ERR_VALUE', 'grpoStep', /logits/)
    }))
})
