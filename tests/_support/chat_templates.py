"""Chat templates in the styles that models come with, in our words.

Each does what the template of its family does to roles, white space, thoughts and tools, so that
all of the language is there that such templates use.
"""

GEMMA3 = """{{ bos_token }}
{%- set lead = '' -%}
{%- set rest = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set lead = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set lead = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set rest = messages[1:] -%}
{%- endif -%}
{%- for m in rest -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("user and assistant must take turns") }}
    {%- endif -%}
    {%- set who = 'model' if m['role'] == 'assistant' else m['role'] -%}
    {{ '<start_of_turn>' + who + '\n' + (lead if loop.first else '') }}
    {%- if m['content'] is string -%}
        {{ m['content'] | trim }}
    {%- elif m['content'] is iterable -%}
        {%- for part in m['content'] -%}
            {%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif part['type'] == 'text' -%}{{ part['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("unknown content") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

GEMMA1 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('no system role here') }}{% endif %}
{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}
{% set who = m['role'] %}{% if m['role'] == 'assistant' %}{% set who = 'model' %}{% endif %}
{{ '<start_of_turn>' + who + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

GEMMA4 = """{%- macro value(x, quoted) -%}
    {%- if x is string -%}{{ '<|"|>' + x + '<|"|>' }}
    {%- elif x is boolean -%}{{ 'true' if x else 'false' }}
    {%- elif x is none -%}null
    {%- elif x is mapping -%}
        {{- '{' -}}
        {%- set state = namespace(more=false) -%}
        {%- for k, v in x | dictsort -%}
            {%- if state.more %},{% endif -%}{%- set state.more = true -%}
            {{- ('<|"|>' + k + '<|"|>') if quoted else k -}}:{{- value(v, quoted) -}}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif x is sequence -%}
        {{- '[' -}}
        {%- for v in x -%}{{- value(v, quoted) -}}{%- if not loop.last %},{% endif -%}{%- endfor -%}
        {{- ']' -}}
    {%- else -%}{{ x }}{%- endif -%}
{%- endmacro -%}
{%- macro no_thoughts(text) -%}
    {%- set out = namespace(text='') -%}
    {%- for piece in text.split('<channel|>') -%}
        {%- if '<|channel>' in piece -%}
            {%- set out.text = out.text + piece.split('<|channel>')[0] -%}
        {%- else -%}{%- set out.text = out.text + piece -%}{%- endif -%}
    {%- endfor -%}
    {{- out.text | trim -}}
{%- endmacro -%}
{%- macro result(name, x) -%}
    {{- '<|tool_response>' -}}
    {%- if x is mapping -%}
        {{- 'response:' + name + '{' -}}
        {%- for k, v in x | dictsort -%}
            {{- k -}}:{{- value(v, false) -}}{%- if not loop.last %},{% endif -%}
        {%- endfor -%}
        {{- '}' -}}
    {%- else -%}{{- 'response:' + name + '{value:' + value(x, false) + '}' -}}{%- endif -%}
    {{- '<tool_response|>' -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set todo = messages -%}
{%- set state = namespace(last=none, user=-1) -%}
{%- if (enable_thinking is defined and enable_thinking) or tools
       or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\n' -}}
    {%- if enable_thinking is defined and enable_thinking -%}{{- '<|think|>\n' -}}{%- endif -%}
    {%- if messages[0]['role'] in ['system', 'developer'] -%}
        {{- messages[0]['content'] | trim -}}{%- set todo = messages[1:] -%}
    {%- endif -%}
    {%- for tool in tools or [] -%}
        {%- set f = tool['function'] -%}
        {{- '<|tool>declaration:' + f['name'] + '{description:' + value(f['description']) -}}
        {%- if f.get('parameters') -%},parameters:{{- value(f['parameters'], false) -}}{%- endif -%}
        {{- '}<tool|>' -}}
    {%- endfor -%}
    {{- '<turn|>\n' -}}
{%- endif -%}
{%- for i in range(todo | length) -%}
    {%- if todo[i]['role'] == 'user' -%}{%- set state.user = i -%}{%- endif -%}
{%- endfor -%}
{%- for m in todo -%}
    {%- if m['role'] != 'tool' -%}
        {%- set state.last = none -%}
        {%- set who = 'model' if m['role'] == 'assistant' else m['role'] -%}
        {%- set before = namespace(role=none, found=false) -%}
        {%- for j in range(loop.index0 - 1, -1, -1) -%}
            {%- if not before.found and todo[j]['role'] != 'tool' -%}
                {%- set before.role = todo[j]['role'] -%}{%- set before.found = true -%}
            {%- endif -%}
        {%- endfor -%}
        {%- if not (who == 'model' and before.role == 'assistant') -%}
            {{- '<|turn>' + who + '\n' -}}
        {%- endif -%}
        {%- set thought = m.get('reasoning') or m.get('reasoning_content') -%}
        {%- if thought and loop.index0 > state.user and m.get('tool_calls') -%}
            {{- '<|channel>thought\n' + thought + '\n<channel|>' -}}
        {%- endif -%}
        {%- set shown = namespace(results=false) -%}
        {%- for call in m['tool_calls'] or [] -%}
            {{- '<|tool_call>call:' + call['function']['name'] + '{' -}}
            {%- for k, v in call['function']['arguments'] | dictsort -%}
                {{- k -}}:{{- value(v, false) -}}{%- if not loop.last %},{% endif -%}
            {%- endfor -%}
            {{- '}<tool_call|>' -}}
            {%- set state.last = 'call' -%}
        {%- endfor -%}
        {%- if m.get('tool_responses') -%}
            {%- for r in m['tool_responses'] -%}
                {{- result(r['name'] | default('unknown'), r['response']) -}}
                {%- set shown.results = true -%}{%- set state.last = 'result' -%}
            {%- endfor -%}
        {%- elif m.get('tool_calls') -%}
            {%- set scan = namespace(over=false) -%}
            {%- for k in range(loop.index0 + 1, todo | length) -%}
                {%- if todo[k]['role'] != 'tool' -%}{%- set scan.over = true -%}{%- endif -%}
                {%- if not scan.over -%}
                    {%- set called = namespace(name=todo[k].get('name') | default('unknown')) -%}
                    {%- for call in m['tool_calls'] -%}
                        {%- if call.get('id') == todo[k].get('tool_call_id') -%}
                            {%- set called.name = call['function']['name'] -%}
                        {%- endif -%}
                    {%- endfor -%}
                    {{- result(called.name, todo[k].get('content')) -}}
                    {%- set shown.results = true -%}{%- set state.last = 'result' -%}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {%- if m['content'] is string -%}
            {{- no_thoughts(m['content']) if who == 'model' else m['content'] | trim -}}
        {%- elif m['content'] is sequence -%}
            {%- for part in m['content'] -%}
                {%- if part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {%- if state.last == 'call' and not shown.results -%}{{- '<|tool_response>' -}}
        {%- elif not (shown.results and not m.get('content')) -%}{{- '<turn|>\n' -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and state.last not in ['call', 'result'] -%}
    {{- '<|turn>model\n' -}}
{%- endif -%}"""

# The same before its authors let it know the role of a tool.
GEMMA4_OLDER = GEMMA4.replace("'tool'", "'none of these'")

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "Tools are given as JSON, one a line:\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\nA call looks so: <tool_call>{...}</tool_call><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(looking=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and m.role == "user" and m.content is string
           and not (m.content.startswith('<tool_response>')
                    and m.content.endswith('</tool_response>')) %}
        {%- set ns.looking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == "user" or (m.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif m.role == "assistant" %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n') %}
            {%- set thought = thought.split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>' + m.role + '\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + m.role + '\n' + content }}
        {%- endif %}
        {%- if m.tool_calls %}
            {%- for call in m.tool_calls %}
                {%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}
                {%- if call.function %}{%- set call = call.function %}{%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- call.name }}
                {{- '", "arguments": ' }}
                {%- if call.arguments is string %}{{- call.arguments }}
                {%- else %}{{- call.arguments | tojson }}{%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

R1 = """{% if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}
{% endif %}
{%- set ns = namespace(first=false, tool=false, output_first=true, system='') %}
{%- for m in messages %}{%- if m['role'] == 'system' %}
{%- set ns.system = m['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}
        {%- set ns.tool = false %}{{- '<｜User｜>' + m['content'] }}
    {%- endif %}
    {%- if m['role'] == 'assistant' and 'tool_calls' in m %}
        {%- set ns.tool = false %}
        {%- for call in m['tool_calls'] %}
            {%- set shown = call['type'] + '<sep>' + call['function']['name'] + '\n```json\n' %}
            {%- set shown = shown ~ (call['function']['arguments'] | tojson) ~ '\n```' %}
            {%- if not ns.first %}
                {{- '<｜Assistant｜>' + (m['content'] or '') + shown }}{%- set ns.first = true %}
            {%- else %}{{- '\n' + shown }}{%- endif %}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
    {%- if m['role'] == 'assistant' and 'tool_calls' not in m %}
        {%- if ns.tool %}
            {{- '<outputs>' + m['content'] + eos_token }}{%- set ns.tool = false %}
        {%- else %}
            {%- set content = m['content'] %}
            {%- if '</think>' in content %}
                {%- set content = content.split('</think>')[-1] %}
            {%- endif %}
            {{- '<｜Assistant｜>' + content + eos_token }}
        {%- endif %}
    {%- endif %}
    {%- if m['role'] == 'tool' %}
        {%- set ns.tool = true %}
        {%- if ns.output_first %}{{- '<output>' }}{%- set ns.output_first = false %}
        {%- else %}{{- '\n<output>' }}{%- endif %}
        {{- m['content'] + '</output>' }}
    {%- endif %}
{%- endfor -%}
{%- if ns.tool %}{{- '<outputs>' }}{%- endif %}
{%- if add_generation_prompt and not ns.tool %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {{- "Functions, as JSON:\n\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{{- system }}{{- "<|eot_id|>" }}
{%- for m in messages %}
    {%- if not (m.role == 'tool' or 'tool_calls' in m) %}
        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if not m.tool_calls | length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if m.content is mapping or (m.content is iterable and m.content is not string) %}
            {{- m.content | tojson }}
        {%- else %}{{- m.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}{%- set todo = messages[1:] %}
{%- else %}{%- set todo = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set asked = todo | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for m in todo %}
    {%- if not (m.role == "tool" or m.tool_calls is defined) %}
        {%- if (m["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("user and assistant take turns") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in todo %}
    {%- if m["role"] == "user" %}
        {%- if tools is not none and (m == asked[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\n\n" + m["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + m["content"] + "[/INST]" }}{%- endif %}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in m.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception("ids of calls have nine characters") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif m["role"] == "assistant" %}{{- " " + m["content"] | trim + eos_token }}
    {%- elif m["role"] == "tool" %}
        {%- set content = m.content.content if m.content.content is defined else m.content %}
        {{- '[TOOL_RESULTS] {"content": ' + content | string + ", " }}
        {{- '"call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception("unknown role") }}{%- endif %}
{%- endfor %}"""

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

FUNCTION = """{%- macro argument(x) -%}
    {%- if x is string -%}{{ '<escape>' + x + '<escape>' }}
    {%- elif x is boolean -%}{{ 'true' if x else 'false' }}
    {%- elif x is mapping -%}{{ '{' }}
        {%- for k, v in x.items() -%}
            {{ k + ':' + argument(v) }}{{ ',' if not loop.last }}
        {%- endfor -%}
        {{ '}' }}
    {%- elif x is iterable -%}{{ '[' }}
        {%- for v in x -%}{{ argument(v) }}{{ ',' if not loop.last }}{%- endfor -%}{{ ']' }}
    {%- else -%}{{ x }}{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set ns = namespace(previous='') -%}
{%- set todo = messages -%}
{%- if tools or messages[0]['role'] in ['developer', 'system'] -%}
    {{ '<start_of_turn>developer\n' }}
    {%- if messages[0]['role'] in ['developer', 'system'] -%}
        {{ messages[0]['content'] | trim }}{%- set todo = messages[1:] -%}
    {%- endif -%}
    {%- for tool in tools -%}
        {{ '<start_function_declaration>declaration:' ~ tool.function.name ~ '{description:' }}
        {{- argument(tool.function.description) }}
        {%- for name, about in tool.function.parameters.properties | dictsort -%}
            {{ ',' ~ name ~ ':{type:' ~ argument(about.type | upper) ~ '}' }}
        {%- endfor -%}
        {{ '}<end_function_declaration>' }}
    {%- endfor -%}
    {{ '<end_of_turn>\n' }}
{%- endif -%}
{%- for m in todo -%}
    {%- if m['role'] == 'tool' -%}
        {{ '<start_function_response>response:' + m['name'] + '{value:' + argument(m['content']) }}
        {{- '}<end_function_response>' }}
    {%- else -%}
        {%- if ns.previous != 'tool' -%}
            {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}
        {%- endif -%}
        {{ m.get('content') or '' | trim }}
        {%- for call in m.tool_calls or [] -%}
            {{ '<start_function_call>call:' + call.function.name }}
            {{- argument(call.function.arguments) }}
            {{- '<end_function_call>' }}
        {%- endfor -%}
        {{ '<start_function_response>' if m.tool_calls else '<end_of_turn>\n' }}
    {%- endif -%}
    {%- set ns.previous = m['role'] -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.previous != 'tool' -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}"""

# Special tokens that are put together.
PHI = """{% for m in messages %}{% if m['role'] == 'system' and tools %}
{{- '<|' + m['role'] + '|>' + m['content'] }}
{{- '<|tool|>' + tools | tojson + '<|/tool|>' + '<|end|>' }}
{%- else %}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% else %}{{- eos_token }}{% endif %}"""

# Parts alone.
PARTS = """{% for m in messages %}{{ m['role'].capitalize() }}
{%- if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}
{%- for part in m['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}{{ '<image>' }}
{%- endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

ALL = {
    "gemma3": GEMMA3,
    "gemma1": GEMMA1,
    "gemma4": GEMMA4,
    "gemma4 older": GEMMA4_OLDER,
    "qwen3": QWEN3,
    "r1": R1,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "chatml": CHATML,
    "function": FUNCTION,
    "phi": PHI,
    "parts": PARTS,
}

# Short ones that look into the content, or use a corner of the language.
CORNERS = {
    "startswith": "{{ 'Y' if messages[0].content.startswith('he') else 'N' }}<eos>",
    "equal": "{{ 'Y' if messages[0].content == 'hello' else 'N' }}<eos>",
    "length": "{{ messages[0].content | length }}<eos>{{ messages[0].content|count }}",
    "slice": "{{ messages[0].content[1:-1] }}<eos>{{ messages[0].content[::-1] }}",
    "in": "{{ 'Y' if '</think>' in messages[0].content else 'N' }}<eos>",
    "replace": "{{ messages[0].content.replace('l', '<eos>') | replace('e', 'E', 1) }}",
    "split": "{% for x in messages[0].content.split('l') %}{{ x }}<eos>{% endfor %}",
    "rsplit": "{{ messages[0].content.rsplit(None, 1)[-1] }}<eos>"
    "{{ 'a b c'.split() | join('<eos>') }}",
    "partition": "{{ messages[0].content.partition('</think>')[2] or 'none' }}<eos>",
    "characters": "{% for c in messages[0].content %}{{ c }}|{% endfor %}<eos>",
    "count": "{{ messages[0].content.count('l') }}{{ [1, 2, 1].count(1) }}<eos>",
    "case": "{{ messages[0].content | upper }}{{ messages[0].content.title() }}<eos>",
    "safe": "{{ ('<eos>' | safe) }}{{ messages[0].content | safe }}",
    "round": "{{ 2.567 | round(1) }}{{ 7 | round }}{{ (5 / 2) | int }}{{ 7 // 2 }}{{ 2 ** 3 }}"
    "<eos>",
    "sort": "{{ [3, 1, 2] | sort | join(',') }}<eos>"
    "{{ messages | map(attribute='role') | sort | first }}",
    "documents": "{{ documents is defined }}{{ documents is none }}{{ tools is none }}<eos>",
    "tojson": "{{ {'b': 'é<', 'a': [1, none, true]} | tojson(sort_keys=true) }}"
    "{{ {'b': 'é', 'a': 2} | tojson(ensure_ascii=true, separators=(',', ':')) }}"
    "{{ [messages[0].content, {'a': 1}] | tojson(indent=2) }}<eos>",
    "concatenation": "{{ 1 ~ messages[0].content ~ none ~ 2.5 ~ '<eos>' }}",
    "multiplication": "{{ '=' * 3 }}{{ messages[0].content * 2 }}{{ '<eos>' * 2 }}",
    "format": "{{ '%s|%03d' % (messages[0].content, 7) }}"
    "{{ '{}<eos>'.format(messages[0].content) }}",
    "center": "{{ 'x' | center(9) }}{{ messages[0].content | indent(2, true) }}<eos>",
    "strings": "{{ messages[0].content | trim | capitalize }}{{ 'a-b' | title }}"
    "{{ 'x'.zfill(3) }}<eos>",
    "lists": "{{ (['a'] + ['b', messages[0].content]) | reverse | list }}<eos>{{ {'k': [1]} }}",
    "dicts": "{% for k, v in {'b': 1, 'a': 2} | dictsort(by='value', reverse=true) %}{{ k }}{{ v }}"
    "{% endfor %}{{ dict(a=1).get('a') }}{{ dict.fromkeys(['x'], 3)['x'] }}<eos>",
    "loop": "{% for x in 'abc' %}{{ loop.index }}{{ loop.revindex0 }}{{ loop.cycle('o', 'e') }}"
    "{{ loop.previtem }}{{ loop.nextitem }}{{ loop.length }}{{ loop.changed(x) }}{% else %}no"
    "{% endfor %}<eos>",
    "break": "{% for x in range(9) %}{% if x == 2 %}{% continue %}{% endif %}"
    "{% if x > 4 %}{% break %}{% endif %}{{ x }}{% endfor %}<eos>",
    "recursive": "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }})"
    "{% else %}{{ x }}{% endif %}{% endfor %}<eos>",
    "macro": "{% macro say(what, n=2) %}{{ what * n }}{{ caller() if caller else '' }}"
    "{% endmacro %}{{ say(messages[0].content) }}{% call say('x', n=1) %}<eos>{% endcall %}",
    "set block": "{% set x %}{{ messages[0].content }}<eos>{% endset %}{{ x | trim }}"
    "{{ x | length }}",
    "filter block": "{% filter upper %}{{ messages[0].content }}{% endfilter %}<eos>",
    "with": "{% with a = messages[0].content %}{{ a }}{% endwith %}{{ a }}<eos>",
    "namespace": "{% set ns = namespace(self=1, x='') %}{% for m in messages %}"
    "{% set ns.x = ns.x + m.role[0] %}{% endfor %}{{ ns.x }}{{ ns.self }}<eos>",
    "tests": "{{ 3 is divisibleby 3 }}{{ 'a' is in 'abc' }}{{ x is defined }}{{ none is none }}"
    "{{ messages is sequence }}{{ messages[0] is mapping }}{{ 1 is sameas true }}<eos>",
    "groups": "{% for role, ms in messages | groupby('role') %}{{ role }}{{ ms | length }}"
    "{% endfor %}"
    "{{ messages | selectattr('role', 'eq', 'user') | map(attribute='content') | join('<eos>') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% endfor %}",
    "comments": "{# none #}\n  {% if true %}\n  yes\n  {% endif %}\n<eos>\n\n",
    "date": "{{ strftime_now('%Y-%m') }}<eos>",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ nothing }}",
    "conditions": "{{ 'a' if messages | length > 1 }}{{ messages[-1]['role'] or 'x' }}<eos>",
    "raw": "{% raw %}{{ x }}<eos>{% endraw %}",
}
