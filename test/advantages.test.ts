import { type AdvantageEstimator, groupAdvantages, informativeGroups, scope } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { grpoCases } from './golden.js'
import { expectClose, expectRefusal, onEveryBackend, Random, recorded } from './harness.js'

type Options = Parameters<typeof groupAdvantages>[0]

const sum = (x: readonly number[]): number => x.reduce((a, b) => a + b, 0)

const deviation = (x: readonly number[]): number => {
  const mean = sum(x) / x.length
  return Math.sqrt(sum(x.map((v) => (v - mean) ** 2)) / (x.length - 1))
}

interface Given {
  epsilon?: number
  zero?: boolean
  weights?: readonly number[] | undefined
  lengths?: number[]
  scale?: 'group' | 'batch' | 'none'
  combine?: 'sum_then_normalize' | 'normalize_then_sum'
  baselines?: readonly number[]
}

// From the definitions, one sequence at a time. NaN: the sequence, or the kind, does not count.
function oracle(
  estimator: AdvantageEstimator,
  rewards: number[][], // [B][K]
  groups: readonly number[],
  o: Given = {},
): number[] {
  const { epsilon = 1e-6, zero = false, scale = 'group', combine, baselines } = o
  const weights = o.weights ?? rewards[0]?.map(() => 1) ?? []
  if (combine === 'sum_then_normalize') {
    const summed = rewards.map((own) => {
      const applies = own.flatMap((r, k) => (Number.isNaN(r) ? [] : [weights[k]! * r]))
      return [applies.length ? sum(applies) : Number.NaN]
    })
    const { combine: _, weights: __, ...rest } = o
    return oracle(estimator, summed, groups, rest)
  }
  const counts = rewards.map((own) => own.some((r) => !Number.isNaN(r)))
  const lengths = (o.lengths ?? []).map((n, i) => (counts[i] ? n : 0))
  const all = rewards.flatMap(([r], i) => (counts[i] ? [r!] : []))
  const relative = rewards.map((own, i) =>
    sum(
      weights.map((w, k) => {
        if (Number.isNaN(own[k]!)) return 0
        if (estimator === 'reinforce_pp') return own[k]!
        if (estimator === 'remax') return own[k]! - baselines![i]!
        const members = groups.flatMap((g, j) =>
          g === groups[i] && !Number.isNaN(rewards[j]![k]!) ? [j] : [],
        )
        const n = members.length
        const r = members.map((j) => rewards[j]![k]!)
        if (n > 1 && r.every((x) => x === r[0])) return 0
        const alone = n === 1
        if (alone && (zero || estimator === 'grpo_passk' || estimator === 'maxrl')) return 0
        const mean = alone ? 0 : sum(r) / n
        const divisor =
          scale === 'none'
            ? 1
            : epsilon +
              (scale === 'batch' ? (all.length > 1 ? deviation(all) : 1) : alone ? 1 : deviation(r))
        const tokens = sum(members.map((j) => lengths[j] ?? 0))
        switch (estimator) {
          case 'grpo':
          case 'gdpo':
            return (w * (own[k]! - mean)) / divisor
          case 'grpo_passk': {
            const [best, second] = [...r].sort((x, y) => y - x)
            return own[k] === best ? (best! - second!) / divisor : 0
          }
          case 'rloo':
            return alone ? own[k]! : ((own[k]! - mean) * n) / (n - 1)
          case 'opo':
            if (alone || tokens === 0) return own[k]! - mean
            return own[k]! - sum(members.map((j) => lengths[j]! * rewards[j]![k]!)) / tokens
          case 'gpg':
            return ((own[k]! - mean) * all.length) / Math.max(1, all.filter((x) => x !== 0).length)
          case 'maxrl':
            return (own[k]! - mean) / (mean + epsilon)
          default:
            return own[k]! - mean
        }
      }),
    ),
  )
  if (combine === 'normalize_then_sum') {
    const kept = relative.filter((_, i) => counts[i])
    const mean = sum(kept) / kept.length
    const divisor = deviation(kept) + epsilon
    return relative.map((x, i) =>
      !counts[i] || kept.every((v) => v === kept[0]) ? 0 : (x - mean) / divisor,
    )
  }
  if (!['gdpo', 'reinforce_pp', 'reinforce_pp_baseline'].includes(estimator)) return relative
  const tokens = sum(lengths)
  if (tokens < 2) return relative.map(() => 0)
  const mean = sum(relative.map((x, i) => x * lengths[i]!)) / (tokens + 1e-8)
  const squares = sum(relative.map((x, i) => lengths[i]! * (x - mean) ** 2))
  const variance = ((squares / (tokens + 1e-8)) * tokens) / (tokens - 1)
  return relative.map((x, i) => (counts[i] ? (x - mean) / Math.sqrt(variance + 1e-8) : 0))
}

// f64 inside, so one rounding to f32 remains; near 0 what f64 loses by cancellation.
const bound = { absolute: 1e-9, relative: 2 ** -23 }

const estimators = [
  'grpo',
  'dr_grpo',
  'rloo',
  'opo',
  'gdpo',
  'reinforce_pp',
  'reinforce_pp_baseline',
  'gpg',
  'grpo_passk',
  'maxrl',
] as const
const whitened = ['gdpo', 'reinforce_pp', 'reinforce_pp_baseline']

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
        // maxrl divides by a mean that is meant to be positive.
        const rewards = rewardsOf(1).map(([r]) => [estimator === 'maxrl' ? Math.abs(r!) : r!])
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
        if (!whitened.includes(estimator))
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

  for (const estimator of ['grpo', 'grpo_passk'] as const)
    for (const scale of ['batch', 'none'] as const)
      test(`${estimator} by ${scale}`, async () => {
        const rewards = rewardsOf(1)
        using a = recorded(b, `advantages ${estimator} ${scale}`, bound, () =>
          groupAdvantages({ rewards: tensor(rewards), groups, estimator, scale, epsilon: 1e-4 }),
        )
        const expected = oracle(estimator, rewards, groups, { epsilon: 1e-4, scale })
        expectClose(await a.read(), expected, bound)
      })

  for (const combine of ['sum_then_normalize', 'normalize_then_sum'] as const)
    for (const estimator of ['grpo', 'reinforce_pp', 'opo'] as const) {
      if (combine === 'normalize_then_sum' && estimator !== 'grpo') continue
      test(`${combine}, ${estimator}, with kinds that do not apply`, async () => {
        const rewards = rewardsOf(3).map((own, i) =>
          own.map((r, k) => ((i + k) % 5 === 0 || i === 7 ? Number.NaN : r)),
        )
        const weights = [1, 0.5, -2]
        using a = recorded(b, `advantages ${combine} ${estimator}`, bound, () =>
          groupAdvantages({
            rewards: tensor(rewards, 3),
            groups,
            estimator,
            combine,
            weights,
            lengths,
            singleton: 'zero',
          }),
        )
        const got = await a.read()
        const expected = oracle(estimator, rewards, groups, {
          combine,
          weights,
          lengths,
          zero: true,
        })
        expectClose(got, expected, bound)
        expect(got[7]).toBe(0)
      })
    }

  test('remax', async () => {
    const rewards = rewardsOf(1)
    const baselines = Float32Array.from(groups, () => random.uniform())
    using a = recorded(b, 'advantages remax', bound, () =>
      groupAdvantages({
        rewards: tensor(rewards),
        groups,
        estimator: 'remax',
        baselines: b.device.tensor(baselines, [groups.length]),
      }),
    )
    const expected = oracle('remax', rewards, groups, { baselines: Array.from(baselines) })
    expectClose(await a.read(), expected, bound)
  })

  test('rejected sequences leave their group', async () => {
    const rewards = rewardsOf(1)
    const cuSeqlens = [0]
    for (const n of lengths) cuSeqlens.push(cuSeqlens.at(-1)! + n)
    const rejected = new Set([0, 5, 6, 20])
    const mask = Uint8Array.from({ length: cuSeqlens.at(-1)! }, () => 1)
    for (const i of rejected) mask.fill(0, cuSeqlens[i], cuSeqlens[i + 1])
    const kept = rewards.map(([r], i) => [rejected.has(i) || lengths[i] === 0 ? Number.NaN : r!])
    for (const estimator of ['grpo', 'opo', 'reinforce_pp'] as const) {
      using a = recorded(b, `advantages without empty ${estimator}`, bound, () =>
        groupAdvantages({
          rewards: tensor(rewards),
          groups,
          estimator,
          mask: b.device.tensor(mask, [mask.length]),
          cuSeqlens,
          skipEmpty: true,
        }),
      )
      expectClose(await a.read(), oracle(estimator, kept, groups, { lengths }), bound)
    }
  })

  for (const [title, masked, weighted, zeroTail] of [
    ['all tokens', false, false, false],
    ['masked and weighted', true, true, false],
    ['without a baseline of the longest alone', false, false, true],
    ['masked, without a baseline of the longest alone', true, false, true],
  ] as const)
    test(`opt_baseline, ${title}`, async () => {
      const rewards = rewardsOf(1)
      const cuSeqlens = [0]
      for (const n of lengths) cuSeqlens.push(cuSeqlens.at(-1)! + n)
      const T = cuSeqlens.at(-1)!
      const logProbs = Float32Array.from({ length: T }, () => -3 * random.uniform())
      const squaredProbs = logProbs.map((x) => Math.exp(2 * x) + 0.1 * random.uniform())
      const weights = logProbs.map(() => 2 * random.uniform())
      const mask = Uint8Array.from({ length: T }, () => +(random.uniform() < 0.8))
      const column = (x: Float32Array) => b.device.tensor(x, [T])
      // w is a difference of numbers near 1, and W a sum: f64 throughout, so bound holds.
      using a = recorded(b, `advantages opt_baseline ${title}`, bound, () =>
        groupAdvantages({
          rewards: tensor(rewards),
          groups,
          estimator: 'opt_baseline',
          cuSeqlens,
          zeroTail,
          logProbs: column(logProbs),
          squaredProbs: column(squaredProbs),
          ...(masked && { mask: b.device.tensor(mask, [T]) }),
          ...(weighted && { importanceWeights: column(weights) }),
        }),
      )
      expect(a.shape).toEqual([T])
      const keeps = (t: number): boolean => !masked || mask[t] === 1
      const total = (i: number, at: number): number => {
        let sum = 0
        for (let t = cuSeqlens[i]!; t <= cuSeqlens[i]! + at; t++)
          if (keeps(t))
            sum +=
              (weighted ? weights[t]! ** 2 : 1) *
              (1 - 2 * Math.exp(logProbs[t]!) + squaredProbs[t]!)
        return sum
      }
      const expected = new Float64Array(T)
      groups.forEach((id, i) => {
        const members = groups.flatMap((g, j) => (g === id ? [j] : []))
        for (let at = 0; at < lengths[i]!; at++) {
          const t = cuSeqlens[i]! + at
          const here = members.filter((j) => at < lengths[j]! && keeps(cuSeqlens[j]! + at))
          const W = here.map((j) => total(j, at))
          const goOn = members.filter((j) => {
            for (let k = at; k < lengths[j]!; k++) if (keeps(cuSeqlens[j]! + k)) return true
            return false
          })
          const tail = zeroTail && members.length > 1 && goOn.length < 2
          const baseline =
            members.length === 1 || tail
              ? 0
              : sum(here.map((j, k) => rewards[j]![0]! * W[k]!)) / (sum(W) + 1e-8)
          expected[t] = keeps(t) && (id !== 6 || tail) ? rewards[i]![0]! - baseline : 0
        }
      })
      expectClose(await a.read(), expected, bound)
    })

  for (const golden of grpoCases('advantage')) {
    const { estimator, eps, weights, scale, norm } = golden.params
    const names: Record<string, AdvantageEstimator> = {
      reinforce_plus_plus: 'reinforce_pp',
      reinforce_plus_plus_baseline: 'reinforce_pp_baseline',
      trl_sum_then_normalize: 'grpo',
      trl_normalize_then_sum: 'grpo',
    }
    test(`golden ${golden.group}.${golden.id}`, async () => {
      const input = golden.input('rewards')
      const [n, kinds] = input.shape as [number, number | undefined]
      const trl = golden.convention === 'trl'
      const options: Options = {
        rewards: b.device.tensor(Float32Array.from(input.values), kinds ? [n, kinds] : [n]),
        groups: trl
          ? Array.from({ length: n }, (_, i) => Math.floor(i / golden.params.G))
          : golden.input('group').data,
        estimator: names[estimator] ?? estimator,
        ...(eps ? { epsilon: eps } : {}),
        ...(trl ? { singleton: 'zero' as const, combine: estimator.slice(4) } : {}),
        ...(scale ? { scale } : norm === false ? { scale: 'none' as const } : {}),
        ...(weights ? { weights } : {}),
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
        for (const estimator of [
          'grpo',
          'dr_grpo',
          'rloo',
          'opo',
          'gpg',
          'grpo_passk',
          'maxrl',
        ] as const) {
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
      await b.device.synchronize()
      const keep = informativeGroups({ rewards, groups })
      await expect(keep.read()).rejects.toMatchObject({ op: 'informativeGroups' })
      await b.device.synchronize()
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
      refuses({ combine: 'sum' }, 'ERR_VALUE', /combine/)
      refuses({ combine: 'sum_then_normalize' }, 'ERR_VALUE', /\[B, K\]/)
      const kinds = { rewards: b.device.zeros([3, 2]), combine: 'normalize_then_sum' }
      refuses({ ...kinds, estimator: 'rloo' }, 'ERR_VALUE', /grpo/)
      refuses({ ...kinds, weights: [1] }, 'ERR_SHAPE', /weights/)
      refuses({ scale: 'batch', estimator: 'rloo' }, 'ERR_VALUE', /scale/)
      refuses({ scale: 'all' }, 'ERR_VALUE', /scale/)
      refuses({ skipEmpty: true }, 'ERR_VALUE', /lengths/)
      refuses({ skipEmpty: 1 }, 'ERR_VALUE', /skipEmpty/)
      refuses({ estimator: 'remax' }, 'ERR_VALUE', /baselines/)
      refuses({ baselines: rewards }, 'ERR_VALUE', /remax/)
      refuses({ estimator: 'remax', baselines: b.device.zeros([2]) }, 'ERR_SHAPE', /baselines/)
      refuses({ estimator: 'opt_baseline' }, 'ERR_VALUE', /squaredProbs/)
      refuses({ zeroTail: true }, 'ERR_VALUE', /opt_baseline/)
      refuses({ logProbs: rewards, cuSeqlens: [0, 1, 2, 3] }, 'ERR_VALUE', /opt_baseline/)
      refuses({ mask: b.device.zeros([3], 'u8') }, 'ERR_VALUE', /cuSeqlens/)
      refuses(
        { estimator: 'best' },
        'ERR_VALUE',
        /must be 'grpo', 'dr_grpo', .* or 'rloo_vectorized', got 'best'/,
      )
      refuses({ singleton: 'one' }, 'ERR_VALUE')
      refuses({ epsilon: -1 }, 'ERR_VALUE', /epsilon/)
      for (const estimator of ['opo', ...whitened]) refuses({ estimator }, 'ERR_VALUE', /lengths/)
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
