// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";

/// @title The token of a devnet
/// @notice Anything but a devnet gives RewardDistributor a token of its own.
interface IRewardToken is IERC20, IERC20Permit {
    /// @notice Makes tokens out of nothing. Only for the owner.
    /// @param to who gets them
    /// @param amount in the smallest unit
    function mint(address to, uint256 amount) external;
}
