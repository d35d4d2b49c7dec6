import {
  checkArguments,
  checkArray,
  checkBoolean,
  checkString,
  choice,
  type Names,
} from '../arguments.js'
import type { Tool } from './policy.js'

export const answerForms = ['mca', 'na', 'free_form'] as const
/** Multiple choice, answered by a letter ('mca'); a number ('na'); any text ('free_form'). */
export type AnswerForm = (typeof answerForms)[number]

/**
 * The prompts of the roles: templates, in which {question} is replaced.
 *
 * The meaning is that of Perceive-to-Reason's own prompts (verl/utils/dataset/p2r_dataset.py). For a model
 * that was trained on other wording, give that wording as templates.
 */
export interface Prompts {
  /** The system prompt of both roles. */
  system: string
  /** The perceiver's prompt. */
  perceive: string
  /** The reasoner's prompt where the evidence has crops; the instruction of the answer form follows. */
  reason: string
  /** The reasoner's prompt where the evidence has no crops; likewise. */
  reasonWithoutEvidence: string
  /** A ZoomAgent's prompt, which may call image_zoom_in_tool; the instruction of the answer form follows. */
  zoom: string
  /** The instruction of each answer form: where and how the answer is written. */
  forms: Readonly<Record<AnswerForm, string>>
}

const inTags =
  'Write down your reasoning in full between <think> and </think>, and after it, between <answer> and </answer>,'

/**
 * The prompts that are used where none are given.
 *
 * @example
 * ```js
 * import { defaultPrompts, functionPolicy, Reasoner } from 'p2r-kernels'
 *
 * const forms = { ...defaultPrompts.forms, na: 'Answer with a number between <answer> and </answer>.' }
 * const reasoner = new Reasoner(functionPolicy(() => '<answer>7</answer>'), { prompts: { forms } })
 * console.log(defaultPrompts.system) // You are a helpful assistant.
 * ```
 */
export const defaultPrompts: Prompts = Object.freeze({
  system: 'You are a helpful assistant.',
  perceive:
    'Question: {question}\n' +
    'Find the regions of the image that hold the evidence for answering this question. ' +
    'Reply with JSON and nothing else: a list of boxes with coordinates in thousandths of the ' +
    "image's width and height, each with a few words on what it shows, " +
    '[{"bbox_2d": [x1, y1, x2, y2], "label": "description"}]. ' +
    'Reply with the empty list [] if the whole image is needed.',
  reason:
    'Question: {question}\n' +
    'The regions that matter are outlined in the first image and shown enlarged in the others. ' +
    'Reason step by step.\n',
  reasonWithoutEvidence: 'Question: {question}\nReason step by step.\n',
  zoom:
    'Question: {question}\n' +
    'Reason step by step. Where a detail is too small to be seen, call image_zoom_in_tool for its region, ' +
    'several times if needed; answer once you have seen what the question needs.\n',
  forms: Object.freeze({
    mca: `${inTags} the letter of the right option alone (A, B, ...).\n`,
    na: `${inTags} the answer as a number (such as 42 or 3.1).\n`,
    free_form: `${inTags} the answer in words.\n`,
  }),
})

/** Templates that replace those of defaultPrompts; what is left out stays. */
export interface PromptOverrides {
  /** As in Prompts. */
  system?: string
  /** As in Prompts. */
  perceive?: string
  /** As in Prompts. */
  reason?: string
  /** As in Prompts. */
  reasonWithoutEvidence?: string
  /** As in Prompts. */
  zoom?: string
  /** As in Prompts, each form for itself. */
  forms?: Partial<Record<AnswerForm, string>>
}

const promptNames: Names<Prompts> = {
  system: true,
  perceive: true,
  reason: true,
  reasonWithoutEvidence: true,
  zoom: true,
  forms: true,
}
const formNames: Names<Record<AnswerForm, string>> = { mca: true, na: true, free_form: true }

/**
 * What a ZoomAgent asks. The description of tools in the system prompt is that of Qwen's chat templates (Hermes' form).
 *
 * @throws P2RError ERR_VALUE for wrong arguments.
 * @example
 * ```js
 * import { zoomPrompt } from 'p2r-kernels'
 *
 * const prompts = { zoom: '{question} Zoom in.\n', forms: { na: 'Answer with a number.' } }
 * const { prompt } = zoomPrompt({ question: 'How many cars are there?', answerForm: 'na', prompts })
 * console.log(prompt.split('\n')) // [ 'How many cars are there? Zoom in.', 'Answer with a number.' ]
 * ```
 */
export function zoomPrompt(a: ZoomPromptArgs): RolePrompt {
  const op = 'zoomPrompt'
  a = checkArguments(a, zoomNames, op)
  const question = checkString(a.question, 'question', op)
  const form = checkForm(a.answerForm, 'answerForm', op)
  const tools = checkArray(a.tools ?? [], 'tools', op)
  const { system, zoom, forms } = promptsOf(a.prompts, op)
  return {
    system: tools.length ? `${system}${system && '\n\n'}${describeTools(tools)}` : system,
    prompt: fill(zoom, question) + fill(forms[form], question),
  }
}

function describeTools(tools: readonly Tool[]): string {
  const signatures = tools.map((tool) => JSON.stringify({ type: 'function', function: tool }))
  return (
    '# Tools\n\nYou may call one or more of these functions, given as JSON schemas:\n' +
    `<tools>\n${signatures.join('\n')}\n</tools>\n\n` +
    'To call one, write a JSON object with its name and arguments between these tags, and end your reply after it:\n' +
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
  )
}

/** @internal The default prompts with some of them replaced. */
export function promptsOf(overrides: PromptOverrides | undefined, op: string): Prompts {
  if (overrides === undefined) return defaultPrompts
  overrides = checkArguments(overrides, promptNames, op, 'prompts')
  const { forms } = overrides
  if (forms !== undefined) checkArguments(forms, formNames, op, 'prompts.forms')
  return {
    ...withTemplates(defaultPrompts, overrides, 'prompts', op),
    forms: withTemplates(defaultPrompts.forms, forms ?? {}, 'prompts.forms', op),
  }
}

function withTemplates<T extends object>(defaults: T, given: object, path: string, op: string): T {
  const all = { ...defaults }
  for (const [name, template] of Object.entries(given))
    if (template !== undefined && name !== 'forms')
      Object.assign(all, { [name]: checkString(template, `${path}.${name}`, op) })
  return all
}

/** What a role is asked, beside the images. */
export interface RolePrompt {
  /** The system prompt; '' for none. */
  system: string
  /** The user's prompt, which follows the images. */
  prompt: string
}

/** The arguments of perceivePrompt. */
export interface PerceivePromptArgs {
  /** What is asked about the image. */
  question: string
  /**
   * Templates instead of the default prompts.
   * @default {}
   */
  prompts?: PromptOverrides
}

/** The arguments of zoomPrompt. */
export interface ZoomPromptArgs extends PerceivePromptArgs {
  /** How the answer is to be written. */
  answerForm: AnswerForm
  /**
   * Tools that the system prompt describes, and how they are called in the text: for servers without tools.
   * @default none, since the server's chat template describes the request's tools
   */
  tools?: readonly Tool[]
}

/** The arguments of reasonPrompt. */
export interface ReasonPromptArgs extends PerceivePromptArgs {
  /** How the answer is to be written. */
  answerForm: AnswerForm
  /** Whether crops are shown beside the image. */
  hasEvidence: boolean
}

const perceiveNames: Names<PerceivePromptArgs> = { question: true, prompts: true }
const zoomNames: Names<ZoomPromptArgs> = { ...perceiveNames, answerForm: true, tools: true }
const reasonNames: Names<ReasonPromptArgs> = {
  ...perceiveNames,
  answerForm: true,
  hasEvidence: true,
}

/**
 * What a Perceiver asks: for trainers that build the prompts of a batch themselves.
 *
 * @throws P2RError ERR_VALUE for wrong arguments.
 * @example
 * ```js
 * import { perceivePrompt } from 'p2r-kernels'
 *
 * const prompts = { perceive: 'Where is it? {question}' }
 * const { system, prompt } = perceivePrompt({ question: 'Which colour is the car?', prompts })
 * console.log(system) // You are a helpful assistant.
 * console.log(prompt) // Where is it? Which colour is the car?
 * ```
 */
export function perceivePrompt(a: PerceivePromptArgs): RolePrompt {
  const op = 'perceivePrompt'
  a = checkArguments(a, perceiveNames, op)
  const question = checkString(a.question, 'question', op)
  const { system, perceive } = promptsOf(a.prompts, op)
  return { system, prompt: fill(perceive, question) }
}

/**
 * What a Reasoner asks, with the instruction of the answer form.
 *
 * @throws P2RError ERR_VALUE for wrong arguments.
 * @example
 * ```js
 * import { reasonPrompt } from 'p2r-kernels'
 *
 * const { prompt } = reasonPrompt({
 *   question: 'How many cars are there?',
 *   answerForm: 'na',
 *   hasEvidence: false,
 *   prompts: { reasonWithoutEvidence: '{question}\n', forms: { na: 'Answer with a number.' } },
 * })
 * console.log(prompt.split('\n')) // [ 'How many cars are there?', 'Answer with a number.' ]
 * ```
 */
export function reasonPrompt(a: ReasonPromptArgs): RolePrompt {
  const op = 'reasonPrompt'
  a = checkArguments(a, reasonNames, op)
  const question = checkString(a.question, 'question', op)
  const form = checkForm(a.answerForm, 'answerForm', op)
  const hasEvidence = checkBoolean(a.hasEvidence, 'hasEvidence', op)
  const { system, reason, reasonWithoutEvidence, forms } = promptsOf(a.prompts, op)
  const start = hasEvidence ? reason : reasonWithoutEvidence
  return { system, prompt: fill(start, question) + fill(forms[form], question) }
}

/** @internal */
export function checkForm(form: AnswerForm, name: string, op: string): AnswerForm {
  return choice(form, answerForms, name, op)
}

// split and join, because replaceAll would interpret $& in a question.
function fill(template: string, question: string): string {
  return template.split('{question}').join(question)
}
