"""Requirements on `generate` and caches for every causal language model of the catalogue.

transformers' own mixin for this is not in its source distribution. These tests check equalities that hold for any
causal model: decoding with a cache, in chunks, with padding or from embeddings computes what one full forward computes.
"""

import torch
from transformers import PreTrainedModel, StaticCache


TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
NEW_TOKENS = 5


def spread_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Redraw the matrices with larger values, so that attention affects the output; at initialisation it hardly does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(2 * noise / parameter.shape[-1] ** 0.5)
    return model


class GenerationTests:
    """Mixin for [`tests.batteries.upstream.UpstreamCausalLMTests`]."""

    def _generative_models(self, **attributes):
        """Yields models, in eval mode and never ending a sequence early, with token ids and their mask."""
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            for name, value in attributes.items():
                setattr(config, name, value)
            model = spread_weights(model_class(config)).eval()
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = model.generation_config.pad_token_id or 0
            yield model, inputs["input_ids"], inputs["attention_mask"]

    def _generate(self, model, input_ids=None, **kwargs):
        settings = {
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        with torch.no_grad():
            return model.generate(input_ids, **{**settings, **kwargs})

    def test_decoding_with_cache_matches_full_forward(self):
        for model, input_ids, mask in self._generative_models():
            generated = self._generate(model, input_ids, attention_mask=mask)
            self.assertIsNotNone(generated.past_key_values)
            with torch.no_grad():
                full = model(generated.sequences[:, :-1], use_cache=False).logits
            torch.testing.assert_close(
                torch.stack(generated.logits, 1), full[:, input_ids.shape[1] - 1 :], **TOLERANCE
            )

    def test_future_tokens_do_not_matter(self):
        for model, input_ids, _ in self._generative_models():
            changed = input_ids.clone()
            changed[:, -2:] = changed[:, -2:].flip(-1)
            changed[:, -1] = (changed[:, -1] + 1) % model.config.vocab_size
            with torch.no_grad():
                before, after = model(input_ids).logits, model(changed).logits
            torch.testing.assert_close(before[:, :-2], after[:, :-2], **TOLERANCE)
            self.assertFalse(torch.allclose(before[:, -1], after[:, -1], **TOLERANCE))

    def test_prefill_in_chunks_matches_one_forward(self):
        for model, input_ids, _ in self._generative_models():
            with torch.no_grad():
                full = model(input_ids).logits
                first = model(input_ids[:, :3], use_cache=True)
                second = model(input_ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
            torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), full, **TOLERANCE)

    def test_left_padding_does_not_matter(self):
        for model, input_ids, mask in self._generative_models():
            padding = torch.full((input_ids.shape[0], 4), model.generation_config.pad_token_id)
            padded = self._generate(
                model,
                torch.cat((padding, input_ids), 1),
                attention_mask=torch.cat((torch.zeros_like(padding), mask), 1),
            )
            plain = self._generate(model, input_ids, attention_mask=mask)
            torch.testing.assert_close(torch.stack(padded.logits), torch.stack(plain.logits), **TOLERANCE)

    def test_right_padding_does_not_matter(self):
        for model, input_ids, mask in self._generative_models():
            short = mask.clone()
            short[0, -3:] = 0
            with torch.no_grad():
                padded = model(input_ids, attention_mask=short).logits[:1, :-3]
                plain = model(input_ids[:1, :-3]).logits
            torch.testing.assert_close(padded, plain, **TOLERANCE)

    def test_static_cache_matches_dynamic_cache(self):
        for model, input_ids, mask in self._generative_models():
            if not model._can_compile_fullgraph:
                self.skipTest(f"{type(model).__name__} does not claim to serve a static cache")
            dynamic = self._generate(model, input_ids, attention_mask=mask)
            static = self._generate(model, input_ids, attention_mask=mask, cache_implementation="static")
            torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), **TOLERANCE)

    def test_decoding_step_compiles_without_graph_breaks(self):
        """`_can_compile_fullgraph` implies that a step with a static cache is one graph."""
        for model, input_ids, _ in self._generative_models():
            if not model._can_compile_fullgraph:
                self.skipTest(f"{type(model).__name__} does not claim to compile as one graph")
            torch.compiler.reset()
            cache = StaticCache(config=model.config, max_cache_len=input_ids.shape[1] + 2)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            with torch.no_grad():
                full = model(input_ids).logits[:, -2:]
                model(input_ids[:, :-2], past_key_values=cache)
                steps = []
                for position in (-2, -1):
                    token = input_ids[:, position, None]
                    place = torch.tensor([[input_ids.shape[1] + position]])
                    steps.append(compiled(token, position_ids=place, past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(steps, 1), full, **TOLERANCE)

    def test_beam_search_with_and_without_cache(self):
        for model, input_ids, mask in self._generative_models():
            with_cache, without = (
                self._generate(model, input_ids, attention_mask=mask, num_beams=3, output_scores=True, use_cache=cache)
                for cache in (True, False)
            )
            self.assertEqual(with_cache.sequences.tolist(), without.sequences.tolist())
            torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores, **TOLERANCE)

    def test_sampling_several_sequences(self):
        for model, input_ids, mask in self._generative_models():
            runs = []
            for _ in range(2):
                torch.manual_seed(0)
                runs.append(
                    self._generate(model, input_ids, attention_mask=mask, do_sample=True, num_return_sequences=2)
                )
            self.assertEqual(runs[0].sequences.shape, (2 * input_ids.shape[0], input_ids.shape[1] + NEW_TOKENS))
            self.assertEqual(runs[0].sequences.tolist(), runs[1].sequences.tolist())

    def test_prompt_lookup_matches_greedy(self):
        for model, input_ids, _ in self._generative_models():
            prompt = torch.cat((input_ids[:1], input_ids[:1]), 1)
            greedy = self._generate(model, prompt)
            lookup = self._generate(model, prompt, prompt_lookup_num_tokens=2)
            self.assertEqual(lookup.sequences.tolist(), greedy.sequences.tolist())

    def test_continuing_from_a_cache_matches_one_run(self):
        for model, input_ids, mask in self._generative_models():
            whole = self._generate(model, input_ids, attention_mask=mask)
            begun = self._generate(model, input_ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2)
            ones = torch.ones_like(begun.sequences)
            rest = self._generate(
                model,
                begun.sequences,
                attention_mask=ones,
                past_key_values=begun.past_key_values,
                max_new_tokens=NEW_TOKENS - 2,
                min_new_tokens=NEW_TOKENS - 2,
            )
            self.assertEqual(rest.sequences.tolist(), whole.sequences.tolist())

    def test_generating_from_embeddings_matches_token_ids(self):
        for model, input_ids, mask in self._generative_models():
            embeddings = model.get_input_embeddings()(input_ids)
            from_ids = self._generate(model, input_ids, attention_mask=mask)
            from_embeddings = self._generate(model, inputs_embeds=embeddings, attention_mask=mask)
            torch.testing.assert_close(torch.stack(from_embeddings.logits), torch.stack(from_ids.logits), **TOLERANCE)

    def test_generation_returns_requested_outputs(self):
        for model, input_ids, mask in self._generative_models(_attn_implementation="eager"):
            generated = self._generate(
                model, input_ids, attention_mask=mask, output_attentions=True, output_hidden_states=True
            )
            batch, length = input_ids.shape
            layers = self.model_tester.num_hidden_layers
            self.assertEqual(len(generated.hidden_states), NEW_TOKENS)
            self.assertEqual(len(generated.hidden_states[0]), layers + 1)
            self.assertEqual(generated.hidden_states[0][-1].shape[:2], (batch, length))
            self.assertEqual(generated.hidden_states[1][-1].shape[:2], (batch, 1))
            if self.has_attentions:
                for step, attentions in enumerate(generated.attentions):
                    q_len = length if step == 0 else 1
                    self.assertEqual(len(attentions), layers)
                    for weights in attentions:
                        self.assertEqual(
                            weights.shape, (batch, self.model_tester.num_attention_heads, q_len, length + step)
                        )

    def test_logits_to_keep(self):
        for model, input_ids, _ in self._generative_models():
            with torch.no_grad():
                full = model(input_ids).logits
                torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, full[:, -2:], **TOLERANCE)
                indices = torch.tensor([1, 3])
                torch.testing.assert_close(
                    model(input_ids, logits_to_keep=indices).logits, full[:, indices], **TOLERANCE
                )

    def test_packed_sequences_under_a_4d_mask(self):
        """Two sequences in one row, separated by a user-defined mask, give the same result as each alone."""
        for model, input_ids, _ in self._generative_models():
            first, second = input_ids[:1, :3], input_ids[1:2, :4]
            segments = torch.tensor([0] * 3 + [1] * 4)
            allowed = (segments[:, None] == segments) & torch.ones(7, 7, dtype=torch.bool).tril()
            additive = torch.zeros(1, 1, 7, 7).masked_fill(~allowed, torch.finfo(torch.float32).min)
            with torch.no_grad():
                packed = model(
                    torch.cat((first, second), 1),
                    attention_mask=additive,
                    position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
                ).logits
                alone = torch.cat((model(first).logits, model(second).logits), 1)
            torch.testing.assert_close(packed, alone, **TOLERANCE)
