import { type AdvantageEstimator, groupAdvantages, informativeGroups, scope } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { grpoCases } from './golden.js'
import { expectClose, expectRefusal, onEveryBackend, Random, recorded } from './harness.js'

type Options = Parameters<typeof groupAdvantages>[0]

const sum = (x: readonly number[]): number => x.reduce((a, b) => a + b, 0)

// From the definitions, one sequence at a time.
function oracle(
  estimator: AdvantageEstimator,
  rewards: number[][], // [B][K]
  groups: readonly number[],
  o: { epsilon?: number; zero?: boolean; weights?: readonly number[]; lengths?: number[] } = {},
): number[] {
  const { epsilon = 1e-6, zero = false, lengths = [] } = o
  const weights = o.weights ?? rewards[0]?.map(() => 1) ?? []
  const scaled = estimator === 'grpo' || estimator === 'gdpo'
  const relative = rewards.map((own, i) => {
    const members = groups.flatMap((g, j) => (g === groups[i] ? [j] : []))
    const n = members.length
    return sum(
      weights.map((w, k) => {
        const r = members.map((j) => rewards[j]![k]!)
        if (n === 1) return zero ? 0 : (w * own[k]!) / (scaled ? 1 + epsilon : 1)
        if (r.every((x) => x === r[0])) return 0
        const mean = sum(r) / n
        const tokens = sum(members.map((j) => lengths[j] ?? 0))
        const std = Math.sqrt(sum(r.map((x) => (x - mean) ** 2)) / (n - 1))
        if (scaled) return (w * (own[k]! - mean)) / (std + epsilon)
        if (estimator === 'rloo') return ((own[k]! - mean) * n) / (n - 1)
        if (estimator === 'opo' && tokens > 0)
          return own[k]! - sum(members.map((j) => lengths[j]! * rewards[j]![k]!)) / tokens
        return own[k]! - mean
      }),
    )
  })
  if (estimator !== 'gdpo' && estimator !== 'reinforce_pp_baseline') return relative
  const tokens = sum(lengths)
  if (tokens < 2) return relative.map(() => 0)
  const mean = sum(relative.map((x, i) => x * lengths[i]!)) / (tokens + 1e-8)
  const squares = sum(relative.map((x, i) => lengths[i]! * (x - mean) ** 2))
  const variance = ((squares / (tokens + 1e-8)) * tokens) / (tokens - 1)
  return relative.map((x) => (x - mean) / Math.sqrt(variance + 1e-8))
}

// f64 inside, so one rounding to f32 remains; near 0 what f64 loses by cancellation.
const bound = { absolute: 1e-9, relative: 2 ** -23 }

const estimators = ['grpo', 'dr_grpo', 'rloo', 'opo', 'gdpo', 'reinforce_pp_baseline'] as const

onEveryBackend('advantages', (b) => {
  // Interleaved groups of 1 to 70, with ids in no order, one of equal rewards.
  const random = new Random(4)
  const sizes = [1, 2, 3, 8, 33, 70, 4]
  const ids = [7, -3, 1_000_000, 0, 12, 5, 6]
  const groups = sizes
    .flatMap((n, g) => Array<number>(n).fill(ids[g]!))
    .map((id) => ({ id, at: random.uniform() }))
    .sort((x, y) => x.at - y.at)
    .map((x) => x.id)
  const rewardsOf = (kinds: number): number[][] =>
    groups.map((id) =>
      Array.from({ length: kinds }, () => Math.fround(id === 6 ? 0.1 : random.normal())),
    )
  const lengths = groups.map(() => random.int(0, 30))
  const tensor = (rewards: number[][], kinds?: number) =>
    b.device.tensor(
      Float32Array.from(rewards.flat()),
      kinds ? [rewards.length, kinds] : [rewards.length],
    )

  for (const estimator of estimators)
    for (const singleton of ['reward', 'zero'] as const)
      test(`${estimator}, a group of one: ${singleton}`, async () => {
        const rewards = rewardsOf(1)
        const options = { groups, estimator, singleton, lengths, epsilon: 1e-4 }
        using a = recorded(b, `advantages ${estimator} ${singleton}`, bound, () =>
          groupAdvantages({ rewards: tensor(rewards), ...options }),
        )
        const expected = oracle(estimator, rewards, groups, {
          epsilon: 1e-4,
          zero: singleton === 'zero',
          lengths,
        })
        const got = await a.read()
        expectClose(got, expected, bound)
        if (estimator !== 'gdpo' && estimator !== 'reinforce_pp_baseline')
          groups.forEach((id, i) => {
            if (id === 6) expect(got[i]).toBe(0)
          })
      })

  for (const kinds of [1, 3])
    test(`gdpo of ${kinds} kinds`, async () => {
      const rewards = rewardsOf(kinds)
      const weights = [1, 0.5, -2].slice(0, kinds)
      using a = recorded(b, `gdpo ${kinds}`, bound, () =>
        groupAdvantages({
          rewards: tensor(rewards, kinds),
          groups: Int32Array.from(groups),
          estimator: 'gdpo',
          weights,
          lengths: Uint32Array.from(lengths),
        }),
      )
      expectClose(await a.read(), oracle('gdpo', rewards, groups, { weights, lengths }), bound)
    })

  for (const golden of grpoCases('advantage')) {
    const { estimator, eps, weights, scale } = golden.params
    const surface =
      estimator === 'reinforce_plus_plus_baseline'
        ? 'reinforce_pp_baseline'
        : estimator === 'trl_sum_then_normalize' && scale === 'group'
          ? 'grpo'
          : estimator === 'trl_sum_then_normalize' && scale === 'none'
            ? 'dr_grpo'
            : estimator
    if (!estimators.includes(surface)) continue // not in the surface; see the golden's README
    test(`golden ${golden.group}.${golden.id}`, async () => {
      const input = golden.input('rewards')
      const [n, kinds] = input.shape as [number, number | undefined]
      const trl = golden.convention === 'trl'
      // TRL weighs and sums its kinds before it compares: host work here.
      const values = trl
        ? Float64Array.from({ length: n }, (_, i) =>
            sum(weights.map((w: number, k: number) => w * input.values[i * kinds! + k]!)),
          )
        : input.values
      const options: Options = {
        rewards: b.device.tensor(Float32Array.from(values), kinds && !trl ? [n, kinds] : [n]),
        groups: trl
          ? Array.from({ length: n }, (_, i) => Math.floor(i / golden.params.G))
          : golden.input('group').data,
        estimator: surface,
        ...(eps ? { epsilon: eps } : {}),
        ...(trl ? { singleton: 'zero' as const } : {}),
        ...(weights && !trl ? { weights } : {}),
        ...(trl ? {} : { lengths: golden.input('lengths').data }),
      }
      // Rewards are rounded to f32 here, which std (0.1 or more) and n / (n - 1) magnify. Where constant
      // rewards leave the reference a rounding error, we have 0.
      const loose = { absolute: 2e-6, relative: 1e-6 }
      const got = await recorded(b, `golden ${golden.group}.${golden.id}`, bound, () =>
        groupAdvantages(options),
      ).read()
      if (golden.has('adv')) expectClose(got, golden.output('adv').values, loose)
      if (!golden.has('adv_tokens')) return
      const { values: tokens, shape } = golden.output('adv_tokens')
      const lengths = golden.input('lengths').values
      const first = Array.from({ length: n }, (_, i) => i).filter((i) => lengths[i]! > 0)
      expectClose(
        first.map((i) => got[i]!),
        first.map((i) => tokens[i * shape[1]!]!),
        loose,
      )
    })
  }

  test('golden dapo_filter', async () => {
    for (const golden of grpoCases('group_filter')) {
      const rewards = golden.input('rewards').values
      const keep = recorded(b, 'informative groups', {}, () =>
        informativeGroups({
          rewards: b.device.tensor(Float32Array.from(rewards), [rewards.length]),
          groups: golden.input('group').data,
        }),
      )
      expect(keep.dtype).toBe('u8')
      expect(Array.from(await keep.read())).toEqual(Array.from(golden.output('keep').values))
    }
  })

  test('equal rewards give exactly 0, for any group size and value', async () => {
    for (const r of [0.1, 0.3, 1 / 3, 1e30, -7e-12])
      for (const n of [2, 3, 6, 7, 8, 9, 100])
        for (const estimator of ['grpo', 'dr_grpo', 'rloo', 'opo'] as const) {
          using a = groupAdvantages({
            rewards: b.device.tensor(new Float32Array(n).fill(r), [n]),
            groups: new Int32Array(n),
            estimator,
            lengths: Array.from({ length: n }, (_, i) => i),
          })
          expect(Array.from(await a.read())).toEqual(Array(n).fill(0))
        }
  })

  test('without tokens opo uses the mean, whitening gives 0', async () => {
    const rewards = b.device.tensor([1, 0, 5], [3])
    const make = (estimator: AdvantageEstimator, lengths: number[]) =>
      groupAdvantages({ rewards, groups: [0, 0, 1], estimator, lengths }).read()
    expect(Array.from(await make('opo', [0, 0, 0]))).toEqual([0.5, -0.5, 5])
    expect(Array.from(await make('reinforce_pp_baseline', [0, 1, 0]))).toEqual([0, 0, 0])
    expect(Array.from(await make('gdpo', [0, 0, 0]))).toEqual([0, 0, 0])
  })

  for (const bad of [NaN, Infinity, -Infinity])
    test(`a reward of ${bad} faults`, async () => {
      const rewards = b.device.tensor([1, bad, 0.5], [3])
      const groups = [0, 0, 1]
      const fault = { code: 'ERR_VALUE', op: 'groupAdvantages' }
      const advantages = recorded(b, `advantages of ${bad}`, bound, () =>
        groupAdvantages({ rewards, groups }),
      )
      await expect(advantages.read()).rejects.toMatchObject(fault)
      await expect(b.device.synchronize()).rejects.toMatchObject(fault)
      const keep = informativeGroups({ rewards, groups })
      await expect(keep.read()).rejects.toMatchObject({ op: 'informativeGroups' })
      await expect(b.device.synchronize()).rejects.toMatchObject({ op: 'informativeGroups' })
      expect((await rewards.read()).length).toBe(3)
    })

  test('an empty batch', () => {
    const rewards = b.device.zeros([0])
    expect(groupAdvantages({ rewards, groups: [] }).shape).toEqual([0])
    expect(informativeGroups({ rewards, groups: [] }).shape).toEqual([0])
    const two = { rewards: b.device.zeros([0, 2]), groups: [], lengths: [] }
    expect(groupAdvantages({ ...two, estimator: 'gdpo' }).shape).toEqual([0])
  })

  test('refuses invalid arguments', () =>
    scope(() => {
      const rewards = b.device.zeros([3])
      const a = { rewards, groups: [0, 0, 1] }
      const op = 'groupAdvantages'
      const refuses = (extra: object, code: string, message?: RegExp) =>
        expectRefusal(() => groupAdvantages({ ...a, ...extra } as Options), code, op, message)
      refuses({ groups: [0, 0] }, 'ERR_SHAPE', /groups/)
      refuses({ groups: [0, 0, 0.5] }, 'ERR_VALUE', /groups\[2\]/)
      refuses({ groups: 3 }, 'ERR_VALUE')
      refuses({ rewards: [1, 2, 3] }, 'ERR_VALUE')
      refuses({ rewards: b.device.zeros([3], 'bf16') }, 'ERR_DTYPE')
      refuses({ rewards: b.device.zeros([3, 2]) }, 'ERR_SHAPE', /gdpo/)
      refuses(
        { estimator: 'best' },
        'ERR_VALUE',
        /must be 'grpo', 'dr_grpo', 'rloo', 'opo', 'gdpo' or 'reinforce_pp_baseline', got 'best'/,
      )
      refuses({ singleton: 'one' }, 'ERR_VALUE')
      refuses({ epsilon: -1 }, 'ERR_VALUE', /epsilon/)
      for (const estimator of ['opo', 'gdpo', 'reinforce_pp_baseline'])
        refuses({ estimator }, 'ERR_VALUE', /lengths/)
      refuses({ estimator: 'opo', lengths: [1, 2] }, 'ERR_SHAPE', /lengths/)
      refuses({ estimator: 'opo', lengths: [1, 2, -1] }, 'ERR_VALUE', /lengths\[2\]/)
      refuses({ weights: [1] }, 'ERR_VALUE', /gdpo/)
      refuses({ estimator: 'gdpo', weights: [1, 2], lengths: [1, 1, 1] }, 'ERR_SHAPE', /weights/)
      refuses({ estimator: 'gdpo', weights: [NaN], lengths: [1, 1, 1] }, 'ERR_VALUE', /weights/)
      expectRefusal(
        () => informativeGroups({ ...a, groups: [1] }),
        'ERR_SHAPE',
        'informativeGroups',
      )
    }))
})
