"""Conversations: what is said, how models want it spelled, and a cache that goes along."""

from equigemma.chat._chat import Chat as Chat
from equigemma.chat._chat import Sent as Sent
from equigemma.chat._chat import Turn as Turn
from equigemma.chat._formats import Format as Format
from equigemma.chat._formats import Gemma as Gemma
from equigemma.chat._formats import Gemma4 as Gemma4
from equigemma.chat._formats import default_format as default_format
from equigemma.chat._formats import stop_tokens as stop_tokens
from equigemma.chat._json import from_json as from_json
from equigemma.chat._json import to_json as to_json
from equigemma.chat._messages import Assistant as Assistant
from equigemma.chat._messages import Message as Message
from equigemma.chat._messages import System as System
from equigemma.chat._messages import ToolCall as ToolCall
from equigemma.chat._messages import ToolResult as ToolResult
from equigemma.chat._messages import User as User
from equigemma.chat._messages import check_order as check_order
from equigemma.chat._response_parser import Piece as Piece
from equigemma.chat._template import Template as Template
from equigemma.chat._tools import tool_schema as tool_schema
